"""The files of ``--trace``, ``trace/step_00000007.jsonl``: of which steps, and a line for each module.

The first line says the step and how many micro-batches (leaves) it has. Each other has ``pass`` (forward, backward,
gradient or weight), ``name`` and ``hashes``: of an activation or its gradient one for each leaf, in their order; of a
weight, or its complete gradient, one. The lines are in the order of execution, and the same at every layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from argonne.files import write_text
from argonne.parallel.errors import ArgonneError

Kind = Literal["forward", "backward", "gradient", "weight"]
OF_LEAVES: tuple[Kind, ...] = ("forward", "backward")
"""What has a hash for each micro-batch; all else has one."""
DIRECTORY = "trace"


@dataclass(frozen=True)
class TracedSteps:
    """Which steps are traced."""

    ranges: tuple[range, ...]

    @classmethod
    def of(cls, words: str) -> TracedSteps:
        """``7``, ``1-20``, ``1-100:10`` (every tenth from the first), or several with commas between.

        Raises:
            ArgonneError: it is none of these.
        """
        found = []
        for part in words.split(","):
            number = "([1-9][0-9]{0,17})"
            match = re.fullmatch(f"{number}(?:-{number}(?::{number})?)?", part.strip())
            steps = range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1)) if match else range(0)
            if not steps:
                raise ArgonneError(
                    f"trace={words!r} is not legal; legal: a step (7), steps (1-20), every tenth of them (1-100:10), "
                    "or several of these with commas between"
                )
            found.append(steps)
        return cls(tuple(found))

    def __contains__(self, step: int) -> bool:
        return any(step in steps for steps in self.ranges)


NO_STEPS = TracedSteps(())


@dataclass(frozen=True)
class TraceLine:
    """The hashes of one module's output, or of one weight."""

    kind: Kind
    name: str
    hashes: tuple[int, ...]
    """One for each leaf of the step; of weights and their gradients one. 64 bits each."""

    def to_json(self) -> str:
        return json.dumps({"pass": self.kind, "name": self.name, "hashes": [f"{each:016x}" for each in self.hashes]})


def trace_path(run: Path, step: int) -> Path:
    """Where the trace of a step lies in the run's directory."""
    return run / DIRECTORY / f"step_{step:08d}.jsonl"


def write_trace(run: Path, step: int, leaves: int, lines: Sequence[TraceLine]) -> None:
    """Write the trace of a step, whole or not at all."""
    path = trace_path(run, step)
    path.parent.mkdir(exist_ok=True)
    write_text(path, "\n".join([json.dumps({"step": step, "leaves": leaves}), *map(TraceLine.to_json, lines), ""]))


def read_trace(path: Path) -> tuple[int, list[TraceLine]]:
    """The number of leaves of a traced step, and its lines. Raises ``ArgonneError`` when that is not what it is."""
    try:
        first, *rest = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        lines = [TraceLine(r["pass"], r["name"], tuple(int(each, 16) for each in r["hashes"])) for r in rest]
        leaves = int(first["leaves"])
        for line in lines:
            if line.kind not in get_args(Kind) or len(line.hashes) != (leaves if line.kind in OF_LEAVES else 1):
                raise ValueError(f"{line.kind} of {line.name} has {len(line.hashes)} hashes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgonneError(f"{str(path)!r} is no trace of a step: {error}") from error
    return leaves, lines


def traced_steps(run: Path) -> list[int]:
    """The steps of which a run has a trace, ascending."""
    names = (re.fullmatch(r"step_(\d{8,})\.jsonl", path.name) for path in (run / DIRECTORY).glob("step_*.jsonl"))
    return sorted(int(name[1]) for name in names if name)
