"""What is tidied in a run's directory when the run goes on from a step."""

from __future__ import annotations

from pathlib import Path

from argonne.checkpoint import checkpoints, step_of
from argonne.files import set_aside
from argonne.training.report import Reports

# What would stand in the way of a report: a directory under the name of a file, or the reverse.
_REPORTS = {
    "metrics.jsonl": Path.is_dir,
    "samples.md": Path.is_dir,
    "loss.png": Path.is_dir,
    "stats": Path.is_file,
    "trace": Path.is_file,
}


def continue_at(directory: Path, step: int, reports: Reports) -> list[str]:
    """Make the directory say what was true at ``step``; returns a line for each checkpoint set aside.

    What its ``reports`` say of steps past ``step`` is dropped: it is written again. Checkpoints past it are renamed,
    not deleted.
    """
    # Checkpoints first, newest first: if this is interrupted, the next start still begins at `step` or later
    # with every line up to there.
    moved = []
    for path in reversed(checkpoints(directory)):
        if (step_of(path) or 0) > step:
            aside = set_aside(path)
            moved.append(f"checkpoint {path.name} lies past step {step} and was set aside as {aside.name}")
    for name, is_wrong in _REPORTS.items():
        if is_wrong(directory / name):
            moved.append(f"{name} is no report of a run and was set aside as {set_aside(directory / name).name}")
    reports.drop_after(step)
    return moved
