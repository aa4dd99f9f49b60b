"""Which checkpoints a run has, which of them can be trusted, and which go."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from argonne.checkpoint.format import CheckpointError, faults, read_manifest, step_of
from argonne.files import TEMPORARY
from argonne.parallel import ProcessGroups
from argonne.parallel.collectives import gather_objects


def checkpoints(root: Path) -> list[Path]:
    """The step directories of a run that have a manifest, oldest first."""
    if not root.is_dir():
        return []
    found = [(step_of(path), path) for path in root.iterdir() if path.is_dir()]
    return [
        path for step, path in sorted((s, p) for s, p in found if s is not None) if (path / "manifest.json").exists()
    ]


def resolve(path: Path) -> list[Path]:
    """The checkpoints that a path given by a user may mean, oldest first.

    A step directory means itself; a file, the directory that holds it; any other directory, the
    checkpoints in it.

    Raises:
        CheckpointError: there is nothing there, or nothing that is a checkpoint.
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint path {str(path)!r} does not exist")
    directory = path if path.is_dir() else path.parent
    if step_of(directory.resolve()) is not None:
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


def prune(root: Path, keep: int) -> list[Path]:
    """Delete all but the newest ``keep`` checkpoints (at least one stays), and what interrupted saves left.

    Returns:
        The checkpoints that went.
    """
    for path in root.glob("step_*" + TEMPORARY):
        shutil.rmtree(path, ignore_errors=True)
    old = checkpoints(root)[: -max(keep, 1)]
    for path in old:
        # Renamed first: a deletion that is interrupted leaves nothing that looks like a checkpoint.
        doomed = path.with_name(path.name + TEMPORARY)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return old
