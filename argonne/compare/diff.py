"""``python -m argonne diff``: where do two runs part, in their metrics, traces and checkpoints?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from argonne.checkpoint import checkpoints, is_checkpoint, step_of
from argonne.compare.checkpoints import compare_checkpoints
from argonne.compare.finding import Finding, report
from argonne.compare.metrics import compare_metrics
from argonne.compare.traces import compare_traces
from argonne.parallel.errors import ArgonneError
from argonne.training.run.directory import read_run


@dataclass(frozen=True)
class DiffFlags:
    """Name the first step in which two runs differ, then the first checkpoint. The status is 1 where they do."""

    run_a: Annotated[Positional[Path], arg(metavar="RUN_A")]
    """A run's directory, or a step directory."""
    run_b: Annotated[Positional[Path], arg(metavar="RUN_B")]
    """Another one of the same kind."""


def diff(flags: DiffFlags) -> int:
    """Print what differs; the status that the process is to end with."""
    given = {"run_a": flags.run_a, "run_b": flags.run_b}
    kinds = [_is_step_directory(name, path) for name, path in given.items()]
    if all(kinds):
        return report(compare_checkpoints(*given.values()))
    if any(kinds):
        told = " and ".join(f"{name}={str(path)!r}" for name, path in given.items())
        raise ArgonneError(f"{told} are a run and a checkpoint; legal: two runs' directories, or two checkpoints")
    return report(chain.from_iterable(compare(*given.values()) for compare in OF_RUNS))


def _is_step_directory(name: str, path: Path) -> bool:
    """Whether this is a checkpoint; False for a run's directory. Raises ``ArgonneError`` for anything else."""
    if path.is_dir() and is_checkpoint(path):
        return True
    if read_run(path) is None:
        raise ArgonneError(f"{name}={str(path)!r} is neither a run's directory (run.json) nor a checkpoint")
    return False


def compare_identities(one: Path, other: Path) -> Iterator[Finding]:
    """What the two runs are, where that is not the same: it explains differences, and is none by itself."""
    a, b = read_run(one), read_run(other)
    if a is not None and b is not None and (found := a.identity.differences(b.identity)):
        yield Finding(f"the runs are not of one identity: {'; '.join(found)}", differs=False)


def compare_saved(one: Path, other: Path) -> Iterator[Finding]:
    """The first checkpoint that differs, of the steps of which both runs have one."""
    a, b = ({step_of(path): path for path in checkpoints(run)} for run in (one, other))
    common = [step for step in a if step in b]
    for step in common:
        if found := [finding for finding in compare_checkpoints(a[step], b[step]) if finding.differs]:
            yield Finding(f"checkpoint of step {step:,}: it differs, the first of {len(common):,} that both runs have")
            yield from found
            return
    steps = ", ".join(f"{step:,}" for step in common)
    yield Finding(
        f"equal: the checkpoints of steps {steps}" if common else "the runs have no checkpoint of the same step",
        differs=False,
    )


OF_RUNS: tuple[Callable[[Path, Path], Iterator[Finding]], ...] = (
    compare_identities,
    compare_metrics,
    compare_traces,
    compare_saved,
)
"""What is compared of two runs' directories, and reported, in this order."""
