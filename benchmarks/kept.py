"""What a benchmark has measured, case by case: on the disk as soon as it is known, and not measured twice.

A benchmark that is cut off goes on with the cases that are missing, if it is told to. Cases of another machine, other
versions, other sources (of ``argonne/``, and its own) or other settings are not taken for its own. Nothing here needs
PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from argonne.files import read_object, write_text

ROOT = Path(__file__).parents[1]


class Kept:
    """The cases of one JSON file, which is whole at every moment."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any], told: Mapping[str, Any], resume: bool) -> None:
        """Take over what ``path`` has of the same ``identity`` if that is wanted, or begin anew.

        Args:
            path: the file; its directory is made. None: they are kept nowhere.
            identity: what must be equal for two cases to belong together. JSON values.
            told: what the file says besides, of this process: the benchmark's name, its environment.
            resume: whether cases of before are wanted.
        """
        self.path = path
        self.cases: dict[str, Any] = {}
        mine = json.loads(json.dumps({**identity, "benchmark": own_sources()}))
        self.found: dict[str, Any] = {**told, "identity": mine, "complete": False}
        before = read(path) if resume and path is not None else None
        if path is not None and before is not None:
            if changed := differences(before.get("identity", {}), mine, every=True):
                print(f"{path.name} is of other {', '.join(changed)}: measured anew", flush=True)
            else:
                self.cases, self.found = before["cases"], before
        self.found["cases"] = self.cases

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to measure."""
        return bool(self.found["complete"])

    def __contains__(self, name: str) -> bool:
        return name in self.cases

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """The case ``name``, measured now unless that has been done; JSON values."""
        if name not in self.cases:
            self.keep(name, measure())
        return self.cases[name]

    def keep(self, name: str, value: Any) -> None:
        """Have ``value`` on the disk under ``name``."""
        self.cases[name] = value
        self._write()

    def end(self, failures: int = 0, **found: Any) -> dict[str, Any]:
        """All has been measured; what is made of it stands beside the cases. The whole file is returned."""
        self.found |= {"failures": failures, "complete": True} | found
        self._write()
        return self.found

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.found, indent=2) + "\n")


def read(path: Path) -> dict[str, Any] | None:
    """The file of a ``Kept``; None where there is none that can be read."""
    with suppress(OSError, ValueError):
        found = read_object(path)
        if isinstance(found.get("cases"), dict):
            return found
    return None


def differences(one: Mapping[str, Any], other: Mapping[str, Any], every: bool = False) -> list[str]:
    """The names whose values differ; of those that both have, or of ``every`` one."""
    names = one.keys() | other.keys() if every else one.keys() & other.keys()
    return sorted(name for name in names if one.get(name) != other.get(name))


def sources(*folders: str) -> str:
    """A digest of the Python files of folders of this checkout: a commit tells less, and a copy may have none."""
    return _digest(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def own_sources() -> str:
    """A digest of the files of ``benchmarks/`` that this process has imported: of the benchmark that it is."""
    modules = [module for name, module in sys.modules.items() if name.startswith(("benchmarks.", "__main__"))]
    found = {Path(file).resolve() for module in modules if (file := getattr(module, "__file__", None))}
    return _digest(path for path in found if path.parent == ROOT / "benchmarks")


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def installed(package: str) -> str | None:
    """Its version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def where(gpu: str | None, *packages: str) -> dict[str, Any]:
    """The part of an identity that a machine decides: its GPU, versions, and the sources of what is measured."""
    versions = {package: installed(package) for package in ("torch", "triton", *packages)}
    return {"gpu": gpu, **versions, "sources": sources("argonne")}
