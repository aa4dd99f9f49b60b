"""``run.json``, which says what a run is; and the same from its checkpoints, where the file is damaged or gone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from argonne.checkpoint import CheckpointError, checkpoints, load_trainer
from argonne.files import read_object, set_aside, write_json

RUN = "run.json"


def write_run(directory: Path, run: Mapping[str, Any]) -> None:
    """Write ``run.json``, with a SHA-256 of what it says."""
    path = directory / RUN
    if path.is_dir():
        set_aside(path)
    write_json(path, {"sha256": _seal(run), **run})


def stored_run(directory: Path) -> dict[str, Any]:
    """What ``run.json`` says. Raises ``OSError`` or ``ValueError``: why it is not what a run wrote there."""
    run = read_object(directory / RUN)
    seal = run.pop("sha256", None)  # a run of an earlier version has none
    if seal is not None and seal != _seal(run):
        raise ValueError("it has changed since it was written (SHA-256 differs)")
    return _checked(run)


def run_of_checkpoints(directory: Path) -> tuple[dict[str, Any], Path] | None:
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
            names = ("identity", "global_batch", "layout", "flags", "versions")
            return _checked({**{name: saved[name] for name in names}, "first_layout": first}), checkpoint
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


def _checked(run: dict[str, Any]) -> dict[str, Any]:
    """``run``, if it is of the right make; raises ``ValueError``."""
    missing = {"identity", "global_batch", "first_layout"} - set(run)
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    identity, first = run["identity"], run["first_layout"]
    wrong = {
        "identity": not isinstance(identity, dict),
        "global_batch": not _is_count(run["global_batch"]),
        "first_layout": not isinstance(first, dict) or not _is_count(first.get("data", 1)),
    }
    if isinstance(identity, dict):
        groups = ("data", "model", "tokenizer", "schedule")
        wrong |= {f"identity.{name}": not isinstance(identity.get(name, {}), dict) for name in groups}
        data = identity.get("data")
        if isinstance(data, dict):
            shards = data.get("shards") or []
            listed = isinstance(shards, list) and all(isinstance(each, list) for each in shards)
            wrong["identity.data.shards"] = not listed
            wrong["identity.data.lanes"] = not _is_count(data.get("lanes") or 1)
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"its {name} is of another kind")
    return run


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _seal(run: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
