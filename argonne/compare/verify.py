"""``python -m argonne verify``: is a checkpoint as it was written, and does another one hold the same?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from argonne.compare.checkpoints import checkpoint_at, compare_checkpoints, examine
from argonne.compare.finding import Finding, report


@dataclass(frozen=True)
class VerifyFlags:
    """Read every byte of a checkpoint and say what is not as it was written; or compare two, whatever layouts
    wrote them. The status is 1 where there is a fault or a difference."""

    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")]
    """A step directory, or a run's directory (its newest checkpoint)."""
    other: Annotated[Positional[Path | None], arg(metavar="OTHER")] = None
    """Another, which is to hold the same weights, moments and trainer state [only the first is verified]."""


def verify(flags: VerifyFlags) -> int:
    """Print what is wrong; the status that the process is to end with."""
    checkpoint = checkpoint_at(flags.checkpoint)
    if flags.other is None:
        return report(_verified(checkpoint))
    return report(compare_checkpoints(checkpoint, checkpoint_at(flags.other)))


def _verified(checkpoint: Path) -> Iterator[Finding]:
    found = examine(checkpoint)
    yield from map(Finding, found.faults)
    if not found.faults:
        yield Finding(found.summary, differs=False)
