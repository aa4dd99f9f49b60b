"""``run.json``, which says what a run is; and the same from its checkpoints, where the file is damaged or gone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from argonne.checkpoint import CheckpointError, checkpoints, load_trainer
from argonne.files import read_object, seal, set_aside, write_json
from argonne.training.run.identity import RunIdentity, is_count

RUN = "run.json"


@dataclass(frozen=True)
class Search:
    """What a search for a micro-batch that fits into memory has come to."""

    initial: int
    """Sequences of the first that was tried: what the flags asked for."""
    micro_batch: int
    """Sequences of the one that fitted: the run's."""
    here: int | None = None
    """Those of the layout that it is now in, where fewer fit; None: the run's."""

    @classmethod
    def from_json(cls, saved: Any) -> Search | None:
        """What ``dataclasses.asdict`` made; None for None. Raises ``ValueError`` for anything else."""
        if saved is None:
            return None
        if not isinstance(saved, dict):
            raise ValueError("its search is of another kind")
        found = cls(saved.get("initial", 0), saved.get("micro_batch", 0), saved.get("here"))
        if not all(map(is_count, (found.initial, found.micro_batch, found.here or 1))):
            raise ValueError("its search is of another kind")
        return found


@dataclass(frozen=True)
class StoredRun:
    """What a run's directory says that the run is."""

    identity: RunIdentity
    global_batch: int
    """Sequences of an optimizer step."""
    first_layout: Mapping[str, Any]
    """The layout that the run began in: the fields of ``Layout``."""
    search: Search | None = None
    """How its micro-batch was found, where it is not the one that was asked for."""
    layout: Mapping[str, Any] | None = field(default=None, compare=False)
    """The layout that the record was written in."""
    flags: Mapping[str, Any] | None = field(default=None, compare=False)
    """The flags, then."""

    @classmethod
    def from_json(cls, run: Mapping[str, Any]) -> StoredRun:
        """What ``run.json`` says. Raises ``ValueError`` naming what is missing or of another kind."""
        if missing := {each.name for each in fields(cls) if each.default is MISSING} - set(run):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        identity, first = RunIdentity.of_saved(run), run["first_layout"]
        wrong = {
            "global_batch": not is_count(run["global_batch"]),
            "first_layout": not isinstance(first, dict) or not is_count(first.get("data", 1)),
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"its {name} is of another kind")
        search = Search.from_json(run.get("search"))
        return cls(identity, run["global_batch"], first, search, run.get("layout"), run.get("flags"))

    @property
    def first_replicas(self) -> int:
        """Data-parallel ranks that the run began with."""
        return int(self.first_layout.get("data", 1))


def write_run(directory: Path, run: Mapping[str, Any]) -> None:
    """Write ``run.json``, with a SHA-256 of what it says."""
    path = directory / RUN
    if path.is_dir():
        set_aside(path)
    write_json(path, {"sha256": seal(run), **run})


def stored_run(directory: Path) -> StoredRun:
    """What ``run.json`` says. Raises ``OSError`` or ``ValueError``: why it is not what a run wrote there."""
    run = read_object(directory / RUN)
    said = run.pop("sha256", None)  # a run of an earlier version has none
    if said is not None and said != seal(run):
        raise ValueError("it has changed since it was written (SHA-256 differs)")
    return StoredRun.from_json(run)


def run_of_checkpoints(directory: Path) -> tuple[StoredRun, Path] | None:
    """What the newest intact ``trainer.json`` says of the run, and its checkpoint; None where there is none."""
    for checkpoint in reversed(checkpoints(directory)):
        try:
            saved = load_trainer(checkpoint)
            training, layout = saved["flags"]["training"], saved["layout"]
            # The replicas with which the saved flags make the global batch: those that the run began with.
            replicas, rest = divmod(
                saved["global_batch"], training["initial_batch_size"] * training["gradient_accumulation_steps"]
            )
            first = layout if rest or not replicas else {**layout, "data": replicas}
            return StoredRun.from_json({**saved, "first_layout": first}), checkpoint
        except (CheckpointError, ValueError, KeyError, TypeError, ArithmeticError):
            continue
    return None


def mended_run(directory: Path) -> list[str]:
    """A line that says where a run's description is taken from, if its ``run.json`` is damaged or gone."""
    if not checkpoints(directory):
        return []
    try:
        stored_run(directory)
        return []
    except (OSError, ValueError) as error:
        found = run_of_checkpoints(directory)
        source = found[1].name if found else "its checkpoints"
        wrong = f"is damaged ({error})" if os.path.lexists(directory / RUN) else "is missing"
        return [f"{RUN} {wrong} and was made again from {source}"]
