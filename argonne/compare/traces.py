"""The traces of two runs (``--trace``): the first module, forward or backward, gradient or weight that differs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from argonne.compare.finding import Finding
from argonne.training.trace_file import OF_LEAVES, Kind, TraceLine, read_trace, trace_path, traced_steps


@dataclass(frozen=True)
class Parting:
    """The first thing, in the order of execution, that is not the same in two runs."""

    step: int
    leaf: int | None
    """The micro-batch; None for a weight or its complete gradient."""
    kind: Kind
    name: str

    def __str__(self) -> str:
        told = {
            "forward": f"the output of {self.name}",
            "backward": f"the gradient of the output of {self.name}, in backward,",
            "gradient": f"the complete gradient of {self.name}",
            "weight": f"{self.name} after the update",
        }
        where = "" if self.leaf is None else f", micro-batch {self.leaf}"
        return f"step {self.step:,}{where}: {told[self.kind]} differs first"


def compare_traces(one: Path, other: Path) -> Iterator[Finding]:
    """Where two runs part, of the steps that both have traced; nothing of runs that have no traces.

    Raises:
        ArgonneError: as ``first_difference``.
    """
    common = _common_steps(one, other)
    if not common:
        return
    found = first_difference(one, other)
    steps = f"{len(common):,} traced steps ({common[0]:,} to {common[-1]:,})"
    yield Finding(str(found)) if found else Finding(f"equal: modules, gradients and weights of {steps}", differs=False)
    (leaves, lines), (others, other_lines) = (read_trace(trace_path(run, common[0])) for run in (one, other))
    if leaves != others:
        told = f"step {common[0]:,} has {leaves} micro-batches in {one} and {others} in {other}"
        yield Finding(f"{told}: only gradients and weights were compared", differs=False)
    elif apart := {(line.kind, line.name) for line in lines} ^ {(line.kind, line.name) for line in other_lines}:
        kind, name = min(apart)
        yield Finding(f"{len(apart):,} lines of a trace are in one of the runs only ({kind}, {name})", differs=False)


def first_difference(run_a: Path, run_b: Path) -> Parting | None:
    """Where two runs part, of the steps that both have traced; None where all that both have is the same.

    In each step: leaf after leaf its forward and backward pass, in the order of the first run's modules; then
    gradients, then weights. What only one of them has (a layout leaves out what no rank has whole) is passed over, and
    so are the micro-batches of steps that are not cut into as many.

    Raises:
        ArgonneError: a trace cannot be read.
    """
    for step in _common_steps(run_a, run_b):
        (leaves, lines), (others, other_lines) = (read_trace(trace_path(run, step)) for run in (run_a, run_b))
        other = {(line.kind, line.name): line.hashes for line in other_lines}
        for line, leaf in _execution(lines, leaves if leaves == others else 0):
            found = other.get((line.kind, line.name))
            if found is not None and found[leaf or 0] != line.hashes[leaf or 0]:
                return Parting(step, leaf, line.kind, line.name)
    return None


def _execution(lines: Sequence[TraceLine], leaves: int) -> Iterator[tuple[TraceLine, int | None]]:
    by_leaf = [line for line in lines if line.kind in OF_LEAVES]
    for leaf in range(leaves):
        yield from ((line, leaf) for line in by_leaf)
    yield from ((line, None) for line in lines if line.kind not in OF_LEAVES)


def _common_steps(run_a: Path, run_b: Path) -> list[int]:
    return sorted({*traced_steps(run_a)} & {*traced_steps(run_b)})
