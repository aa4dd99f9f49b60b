"""Which checkpoints a run has, which of them can be trusted, and which go."""

from __future__ import annotations

import contextlib
import os
from itertools import groupby
from pathlib import Path

from argonne.checkpoint.format import (
    MANIFEST,
    REPLACED,
    CheckpointError,
    delete,
    faults,
    is_checkpoint,
    read_manifest,
    step_of,
)
from argonne.files import TEMPORARY
from argonne.parallel import ProcessGroups
from argonne.parallel.communication.collectives import collectively, gather_objects


def checkpoints(root: Path) -> list[Path]:
    """The step directories of a run that have a manifest, oldest first; what is replaced before its successor."""
    if not root.is_dir():
        return []
    found = [(step_of(path), REPLACED not in path.name, path) for path in root.iterdir() if path.is_dir()]
    return [path for step, _, path in sorted(f for f in found if f[0] is not None) if (path / MANIFEST).exists()]


def resolve(path: Path) -> list[Path]:
    """The checkpoints that a path given by a user may mean, oldest first.

    A checkpoint means itself, whatever its name; a file, the directory that holds it; any other directory, the
    checkpoints in it.

    Raises:
        CheckpointError: there is nothing there, or nothing that is a checkpoint.
    """
    if not path.exists():
        before = [each for each in checkpoints(path.parent) if each.name.startswith(path.name + REPLACED)]
        if before:  # a save of this step again was killed between its two renames
            return before
        raise CheckpointError(f"checkpoint path {str(path)!r} does not exist")
    directory = path if path.is_dir() else path.parent
    if is_checkpoint(directory):
        read_manifest(directory)
        return [directory]
    if not path.is_dir():
        raise CheckpointError(f"checkpoint path {str(path)!r} is not part of a checkpoint (a step_XXXXXXXX directory)")
    found = checkpoints(directory)
    if not found:
        raise CheckpointError(f"checkpoint path {str(path)!r} holds no checkpoint (a step_XXXXXXXX directory)")
    return found


def newest_valid(candidates: list[Path], groups: ProcessGroups) -> tuple[Path | None, list[str]]:
    """The last of ``candidates`` whose every file is as it was written, and what is wrong with those after it.

    Collective: the ranks share the reading, and agree.
    """
    reports: list[str] = []
    # A slow disk may show one rank a directory before another: all go by what the first rank sees.
    for path in reversed(gather_objects(candidates, groups.world)[0]):
        found = gather_objects(faults(path, groups.world.rank, groups.world.size), groups.world)
        wrong = [fault for part in found for fault in part]
        if not wrong:
            return path, reports
        reports.append(f"checkpoint {path.name} is damaged and was passed over: {wrong[0]}")
    return None, reports


def trusted(path: Path, groups: ProcessGroups) -> tuple[Path, list[str]]:
    """The newest valid one of the checkpoints that ``path`` may mean, and why newer ones were passed over (collective).

    Raises:
        CheckpointError: on every rank, that there is none.
    """
    checkpoint, reports = newest_valid(collectively(lambda: resolve(path), groups.world), groups)
    if checkpoint is None:
        raise CheckpointError(f"checkpoint path {str(path)!r} holds no valid checkpoint: {reports[0]}")
    return checkpoint, reports


def prune(root: Path, keep: int, saved: Path | None = None) -> list[Path]:
    """Delete all but the newest ``keep`` steps, and what interrupted saves left; at least one valid checkpoint stays.

    ``saved`` has just been written, and need not be read again to be trusted. Returns the checkpoints that went.
    """
    for path in root.glob(f"step_*{TEMPORARY}*"):
        delete(path)

    def is_valid(path: Path) -> bool:
        return path == saved or not faults(path)

    for path in checkpoints(root):
        if REPLACED in path.name:  # of a save that was killed
            final = path.with_name(path.name.partition(REPLACED)[0])
            if not final.exists():
                with contextlib.suppress(OSError):
                    os.replace(path, final)
            elif is_valid(final):
                delete(path)
    steps = [list(same) for _, same in groupby(checkpoints(root), key=step_of)]
    kept = [path for same in steps[-max(keep, 1) :] for path in same]
    old = [path for same in steps[: -max(keep, 1)] for path in same]
    if old and not any(map(is_valid, reversed(kept))):
        last_good = next(filter(is_valid, reversed(old)), None)
        old = [path for path in old if path != last_good]
    return [path for path in old if delete(path)]
