"""The directory of a run: what the run is, whether flags mean the same run, and which job has it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import IO

from argonne.checkpoint import checkpoints
from argonne.files import lock, make_directory
from argonne.parallel.errors import ArgonneError
from argonne.training.run.file import RUN, StoredRun, run_of_checkpoints, stored_run
from argonne.training.run.identity import DATA, PRECISION_FLAGS, RunIdentity


def read_run(directory: Path) -> StoredRun | None:
    """What ``run.json`` says of a run, or its checkpoints where that is damaged; None where no run has begun."""
    path = directory / RUN
    try:
        return stored_run(directory)
    except (OSError, ValueError) as error:
        problem = error
    if (found := run_of_checkpoints(directory)) is not None:
        return found[0]
    if os.path.lexists(path):
        raise ArgonneError(
            f"{str(path)!r} does not tell what the run is: {problem}; legal: a copy of it, or (as no checkpoint here "
            "can stand in for it) another --output-dir"
        )
    if directory.is_dir() and checkpoints(directory):
        raise ArgonneError(f"output_dir={str(directory)!r} holds checkpoints but no run.json; legal: a run's directory")
    return None


@dataclasses.dataclass
class Claim:
    """A run's directory that one job has to itself, until this process ends at the latest."""

    lock: IO[str]
    made: list[Path]
    """What there was not before: the lock, and the directories above it, innermost first."""

    def release(self) -> None:
        """Let other jobs in."""
        self.lock.close()

    def undo(self) -> None:
        """Leave as it was a directory in which nothing was done."""
        for path in self.made:
            with contextlib.suppress(OSError):  # what has something in it by now stays
                path.rmdir() if path.is_dir() else path.unlink()
        self.release()


def claim(directory: Path, patience: float = 10.0) -> Claim:
    """Keep every other job out of ``directory`` until the claim is released or this process ends.

    Waits up to ``patience`` seconds for a job that is just ending.

    Raises:
        ArgonneError: another job is at work there.
    """
    path = directory / ".lock"
    made = [each for each in (path, directory, *directory.parents) if not each.exists()]
    deadline = time.monotonic() + patience
    while True:
        make_directory(directory)
        file = path.open("a", encoding="utf-8")
        if lock(file):
            # Another job that was refused may have taken the file away just before.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return Claim(file, made)
        elif time.monotonic() > deadline:
            raise ArgonneError(f"output_dir={str(directory)!r} is in use by another job")
        else:
            time.sleep(0.1)
        file.close()


def require_same(
    saved: RunIdentity,
    wanted: RunIdentity,
    directory: Path,
    accept_data_change: bool = False,
    parts: Collection[str] | None = None,
) -> list[str]:
    """Raise ``ArgonneError`` naming what differs unless both identities are of one run (in ``parts``, or in all).

    Returns the differences that ``accept_data_change`` accepts: shards, weights, text column, filters, the tokenizer.
    """
    found = saved.differences(wanted, parts)
    data = [line for line in found if line.startswith(DATA)]
    if found == data and accept_data_change:
        return data
    if found:
        own, also = "the run's own flags", ""
        if found == data:
            also = ", or --accept-data-change to go on with the new data on purpose"
        if any(line.startswith("precision.") for line in found):
            kept, asked = (PRECISION_FLAGS[identity.state_dtype] for identity in (saved, wanted))
            own += f" (--precision {kept})"
            also += f", or resume.py --precision {asked} to convert its weights and moments on purpose"
        raise ArgonneError(
            f"output_dir={str(directory)!r} holds a different run ({'; '.join(found)}); "
            f"legal: {own}, or another --output-dir{also}"
        )
    return []
