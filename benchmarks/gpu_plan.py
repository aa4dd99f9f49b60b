"""Which parts of ``make gpu`` are done on this machine, which can run, and which is next. Needs no PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks import sanitizer, wheels
from benchmarks.gpu_parts import Part
from benchmarks.kept import ROOT, differences, read, sources, where

PROBE = """
import json, torch
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps([gpus, torch.cuda.get_device_name(0) if gpus else None]))
"""


@dataclass(frozen=True)
class Machine:
    """What decides which parts can run, and which have."""

    gpus: int
    identity: Mapping[str, Any]
    """As ``kept.where`` has it, of everything that an identity may name."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Modules and tools that it lacks, and what that means."""
    problem: str | None = None
    """What PyTorch said when it could not be asked."""


def probe() -> Machine:
    """Look at this machine, in another process: this one is to stay small, and free of the GPU."""
    missing = wheels.missing()
    if sanitizer.find() is None:
        missing[sanitizer.TOOL] = "the kernels do not run under it"
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    gpus, name = (0, None) if done.returncode else json.loads(done.stdout)
    said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    identity = where(name, "liger-kernel") | {"tests": sources("tests")}
    return Machine(gpus, identity, missing, *said)


@dataclass(frozen=True)
class Plan:
    """The parts, on a machine, with their results in a directory."""

    parts: Sequence[Part]
    machine: Machine
    results: Path
    rehearse: Literal["cpu", "null"] | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse == "cpu" else "cuda"

    def path(self, part: Part) -> Path:
        """Of its JSON."""
        return self.results / part.file.format(device=self.device)

    def words(self, part: Part, number: int) -> list[str]:
        """What is behind ``python`` in one of its commands."""
        runs = ROOT / "runs" / f"gpu-{self.machine.identity['sources']}"
        if self.rehearse is not None:
            runs = self.results
        names = {"results": self.results, "runs": runs, "device": self.device}
        words = [word.format(**names) for word in part.commands[number]]
        if part.output is not None:
            words += ["--output", str(self.path(part)), "--resume"]
        if self.rehearse is not None and number == len(part.commands) - 1:
            small = list(part.rehearsal)
            words = _without(words, {word for word in small if word.startswith("--")}) + small
        return words

    def obstacle(self, part: Part) -> str | None:
        """Why it cannot run here."""
        alone = self.rehearse is not None and part.gpus == 1
        lacking = [name for name in part.needs if name in self.machine.missing]
        if lacking and not (alone and lacking == [sanitizer.TOOL]):
            return f"needs {' and '.join(lacking)}"
        return None if alone or self.machine.gpus >= part.gpus else f"needs {part.gpus} GPUs"

    def is_done(self, part: Part) -> bool:
        """Whether all of it has been measured on such a machine, with such sources."""
        found = read(self.path(part))
        return found is not None and bool(found["complete"]) and self._is_of_here(found)

    def cases(self, part: Part) -> int:
        """How many have been."""
        found = read(self.path(part))
        return len(found["cases"]) if found is not None and self._is_of_here(found) else 0

    def failures(self, part: Part) -> int:
        """What it found wrong, in all of its cases."""
        found = read(self.path(part))
        return 0 if found is None else int(found.get("failures", 0))

    def left(self) -> list[Part]:
        """The parts that can run here and are not done."""
        return [part for part in self.parts if self.obstacle(part) is None and not self.is_done(part)]

    def headline(self) -> str:
        """Which part is next."""
        able = [part for part in self.parts if self.obstacle(part) is None]
        waiting = self.left()
        done = f"done {len(able) - len(waiting)} of {len(able)}"
        if not waiting:
            return f"next: nothing, {done}"
        part = waiting[0]
        begun = f", {self.cases(part)} cases are there" if self.cases(part) else ""
        minutes = f"about {part.minutes:g} min"
        if len(waiting) > 1:
            minutes += f"; all that is left about {sum(each.minutes for each in waiting):g} min"
        return f"next: PART={self.parts.index(part) + 1} ({part.what}{begun}), {done}, {minutes}"

    def lines(self) -> list[str]:
        """One for each part."""
        return [
            f"PART={number:<3} {part.name:<15} {part.minutes:>2g} min  {self._state(part):<24}  {part.what}"
            for number, part in enumerate(self.parts, 1)
        ]

    def missing(self) -> str | None:
        """What this machine lacks, and what that means, in one line."""
        lacking = self.machine.missing
        return f"missing: {'; '.join(f'{name} ({loss})' for name, loss in lacking.items())}" if lacking else None

    def _state(self, part: Part) -> str:
        if why := self.obstacle(part):
            return why
        if self.is_done(part):
            failures = self.failures(part)
            return f"done, {failures} failures" if failures else "done"
        return f"{self.cases(part)} cases are there" if self.cases(part) else "not begun"

    def _is_of_here(self, found: Mapping[str, Any]) -> bool:
        return not differences(found.get("identity", {}), self.machine.identity)


def _without(words: Sequence[str], flags: set[str]) -> list[str]:
    """``words`` without those flags and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word in flags
        if not dropping:
            kept.append(word)
    return kept
