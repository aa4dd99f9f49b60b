"""The directory of a run: what the run is, whether flags mean the same run, and which job has it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from argonne.checkpoint import checkpoints
from argonne.data import changes
from argonne.files import make_directory
from argonne.parallel.errors import ArgonneError
from argonne.training.config import RunConfig
from argonne.training.run.file import RUN, run_of_checkpoints, stored_run

# What makes two runs the same run; the layout, the device and where and when to save may change freely.
_SCHEDULE = (
    "total_steps",
    "learning_rate",
    "min_learning_rate",
    "warmup_steps",
    "weight_decay",
    "gradient_clip",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "label_smoothing",
    "z_loss",
)

DATA = ("data.shards", "data.fingerprint", "data.weights", "data.text_column", "data.filters", "tokenizer.")
"""What --accept-data-change accepts: so begin the lines that tell of it."""

PRECISION_FLAGS = {"float32": "fp32", "float64": "fp64"}
"""The flag that keeps weights and moments in a dtype."""


def schedule_identity(config: RunConfig) -> dict[str, Any]:
    """The part of a run's identity that ``resume.py`` may change on purpose."""
    return {name: getattr(config.training, name) for name in _SCHEDULE}


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """``name: saved -> wanted`` for every entry that differs; nested entries as ``group.name``.

    Of ``shards``, which say more than their ``fingerprint``, what was added, removed or changed.
    """
    found = []
    for name in sorted(set(saved) | set(wanted)):
        old, new = saved.get(name), wanted.get(name)
        if name == "shards" and isinstance(old, list) and isinstance(new, list):
            found += [f"shards: {line}" for line in _changed_shards(old, new)]
        elif name == "fingerprint" and saved.get("shards") != wanted.get("shards"):
            continue
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{name}.{line}" for line in differences(old, new)]
        elif old != new:
            found.append(f"{name}: {_short(old)} -> {_short(new)}")
    return found


def _changed_shards(saved: list[Any], wanted: list[Any]) -> list[str]:
    """A line for each change in the listings of the corpora."""
    if len(saved) != len(wanted):
        return [f"{len(saved)} corpora -> {len(wanted)} corpora"]
    lines = [changes(old, new) for old, new in zip(saved, wanted, strict=True)]
    return [line if len(lines) == 1 else f"corpus {number}: {line}" for number, of in enumerate(lines) for line in of]


def read_run(directory: Path) -> dict[str, Any] | None:
    """What ``run.json`` says of a run, or its checkpoints where that is damaged; None where no run has begun."""
    path = directory / RUN
    try:
        return stored_run(directory)
    except (OSError, ValueError) as error:
        problem = error
    found = run_of_checkpoints(directory)
    if found is not None:
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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ArgonneError(f"output_dir={str(directory)!r} is in use by another job") from None
            time.sleep(0.1)
        except OSError:
            return Claim(file, made)  # a file system without locks
        else:
            # Another job that was refused may have taken the file away just before.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return Claim(file, made)
        file.close()


def require_same(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], directory: Path, accept_data_change: bool = False
) -> list[str]:
    """Raise ``ArgonneError`` naming what differs unless both identities are of one run.

    Returns the differences that ``accept_data_change`` accepts: shards, weights, text column, filters, the tokenizer.
    """
    found = differences(saved, wanted)
    data = [line for line in found if line.startswith(DATA)]
    if found == data and accept_data_change:
        return data
    if found:
        own, also = "the run's own flags", ""
        if found == data:
            also = ", or --accept-data-change to go on with the new data on purpose"
        if any(line.startswith("precision.") for line in found):
            kept, asked = (PRECISION_FLAGS[identity["precision"]["state"]] for identity in (saved, wanted))
            own += f" (--precision {kept})"
            also += f", or resume.py --precision {asked} to convert its weights and moments on purpose"
        raise ArgonneError(
            f"output_dir={str(directory)!r} holds a different run ({'; '.join(found)}); "
            f"legal: {own}, or another --output-dir{also}"
        )
    return []


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:24] + "..." + text[-12:]
