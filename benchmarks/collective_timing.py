"""A collective's operands, the check of its result, its time and its bandwidths, in the manner of nccl-tests.

Bandwidths are those of nccl-tests (its ``doc/PERFORMANCE.md``), in GB/s of 10^9 bytes. For a buffer of S bytes,
n ranks and a time t: the algorithm bandwidth is S / t; the bus bandwidth is what each rank's link must carry,
2 (n - 1) / n of that for an all-reduce and (n - 1) / n for an all-gather and a reduce-scatter, whose S is the
whole buffer, gathered or to be scattered. What is timed is the call of ``torch.distributed``, its buffers at hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from argonne.parallel import Axis, ProcessGroups
from argonne.parallel.communication.collectives import barrier

# torch 2.13 renames the two tensor collectives and warns of the old names; 2.11 has the old ones only.
_all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_ROWS = 1 << 16  # of a period each, compared at a time: the comparison's own memory stays small
_FEWEST = 3  # calls that a time is taken from, however slow they are


@dataclass(frozen=True)
class Operation:
    """A collective between ``full`` ``[elements]`` and ``part`` ``[elements / ranks]``, and what it moves."""

    name: str
    transfers: int
    """Bytes through each rank's link, in units of (n - 1) / n of the full buffer."""
    call: Callable[[Tensor, Tensor, Axis], Any]

    def bus_factor(self, ranks: int) -> float:
        """Bus bandwidth / algorithm bandwidth."""
        return self.transfers * (ranks - 1) / ranks


ALL_REDUCE = Operation("all_reduce", 2, lambda full, part, axis: dist.all_reduce(full, group=axis.group))
ALL_GATHER = Operation("all_gather", 1, lambda full, part, axis: _all_gather_tensor(full, part, group=axis.group))
REDUCE_SCATTER = Operation(
    "reduce_scatter", 1, lambda full, part, axis: _reduce_scatter_tensor(part, full, group=axis.group)
)
OPERATIONS = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER)


@dataclass(frozen=True)
class Budget:
    """How long one figure may take."""

    iterations: int
    """Timed calls, at most."""
    warmup: int
    """Calls before the timed ones."""
    seconds: float
    """Timed calls are fewer where they would take longer than this, but never fewer than three."""


@dataclass(frozen=True)
class Timing:
    """The time of each call in seconds: that of the rank for which it was longest."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def fields(self, prefix: str = "") -> dict[str, float]:
        """Median, minimum and maximum in microseconds, as JSON fields."""
        values = {"median": self.median, "min": min(self.seconds), "max": max(self.seconds)}
        return {f"{prefix}{name}_us": round(value * 1e6, 3) for name, value in values.items()}


def measure(actions: Sequence[Callable[[], Any]], budget: Budget, groups: ProcessGroups) -> list[Timing]:
    """Time each of ``actions``; they take turns, so that a slow moment falls on all of them.

    Collective over the tensor axis, whose ranks meet before every call. A call lasts from there until its result
    can be used: between two events of the current stream on a GPU, by the clock on a CPU.
    """
    _turns(actions, 1, groups)  # connections, workspaces, the first touch of memory
    pilot = sum(_slowest(_turns(actions, 1, groups), groups)[0])
    fitting = max(1, int(budget.seconds / max(pilot, 1e-9)))
    _turns(actions, min(max(budget.warmup - 2, 0), fitting), groups)
    rounds = min(budget.iterations, max(_FEWEST, fitting))
    times = _slowest(_turns(actions, rounds, groups), groups)
    return [Timing(tuple(row[index] for row in times)) for index in range(len(actions))]


def bandwidths(size: int, seconds: float, bus_factor: float) -> dict[str, float]:
    """Algorithm and bus bandwidth in GB/s of a collective over ``size`` bytes, as JSON fields."""
    algorithm = size / seconds / 1e9
    return {"algbw_gb_per_s": algorithm, "busbw_gb_per_s": algorithm * bus_factor}


def time_collective(
    operation: Operation, full: Tensor, part: Tensor, budget: Budget, groups: ProcessGroups
) -> dict[str, Any]:
    """Check a collective, then time it: the JSON record of one line of the table."""
    axis = groups.tensor
    wrong = count_wrong(operation, full, part, axis)
    # An all-reduce in place, again and again, leaves only zeros as they are; any other sum grows to infinity.
    full.zero_()
    part.zero_()
    (timing,) = measure([lambda: operation.call(full, part, axis)], budget, groups)
    size = full.numel() * full.element_size()
    return {
        "collective": operation.name,
        "bytes": size,
        "iterations": len(timing.seconds),
        **timing.fields(),
        **bandwidths(size, timing.median, operation.bus_factor(axis.size)),
        "wrong": wrong,
    }


def count_wrong(operation: Operation, full: Tensor, part: Tensor, axis: Axis) -> int:
    """The elements of the result, over all ranks, that are not exactly what they must be."""
    patterns = operand_patterns(full, axis)
    if operation.name == ALL_GATHER.name:
        fill(part, patterns[axis.rank])
        full.fill_(-1)  # in no pattern: what is not written shows
        operation.call(full, part, axis)
        pieces = zip(full.chunk(axis.size), patterns, strict=True)
        return _over_ranks(sum(unequal(piece, pattern) for piece, pattern in pieces), full, axis)
    total = torch.stack(patterns).sum(0)
    fill(full, patterns[axis.rank])
    if operation.name == ALL_REDUCE.name:
        operation.call(full, part, axis)
        return _over_ranks(unequal(full, total), full, axis)
    part.fill_(-1)
    operation.call(full, part, axis)
    return _over_ranks(unequal(part, total.roll(-(axis.rank * part.numel()))), full, axis)


def exact_period(ranks: int, dtype: torch.dtype) -> int:
    """The period of the operands: a prime, so that it divides no usual part; 0 where no sum of ones is exact.

    Values below it, summed over ``ranks`` in any order, stay within the integers that ``dtype`` holds exactly.
    """
    largest = int(2 / torch.finfo(dtype).eps)
    primes = (p for p in range(min(251, largest // ranks + 1), 1, -1) if all(p % q for q in range(2, p)))
    return next(primes, 0)


def operand_patterns(like: Tensor, axis: Axis) -> list[Tensor]:
    """Each rank's integer-valued operand: element i of rank r is (i + r) mod the period; one period of it."""
    period = exact_period(axis.size, like.dtype)
    return [((torch.arange(period, device=like.device) + rank) % period).to(like.dtype) for rank in range(axis.size)]


def fill(tensor: Tensor, pattern: Tensor) -> None:
    """Repeat ``pattern`` along ``tensor`` ``[elements]``."""
    periods, tail = _periods(tensor, pattern)
    periods.copy_(pattern)
    tail.copy_(pattern[: tail.numel()])


def unequal(tensor: Tensor, pattern: Tensor) -> int:
    """The elements of ``tensor`` that differ from ``pattern`` repeated."""
    periods, tail = _periods(tensor, pattern)
    found = sum(int((rows != pattern).sum()) for rows in periods.split(_ROWS))
    return found + int((tail != pattern[: tail.numel()]).sum())


def _periods(tensor: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
    period = pattern.numel()
    whole = tensor.numel() // period
    return tensor[: whole * period].unflatten(0, (whole, period)), tensor[whole * period :]


def _over_ranks(count: int, like: Tensor, axis: Axis) -> int:
    total = torch.tensor(count, device=like.device)
    dist.all_reduce(total, group=axis.group)
    return int(total)


def _turns(actions: Sequence[Callable[[], Any]], rounds: int, groups: ProcessGroups) -> list[list[float]]:
    """Seconds of each action on this rank, in each round."""
    if groups.device.type == "cuda":
        return _turns_on_gpu(actions, rounds, groups)
    times = []
    for _ in range(rounds):
        row = []
        for action in actions:
            barrier(groups.world)
            began = time.perf_counter()
            action()
            row.append(time.perf_counter() - began)
        times.append(row)
    return times


def _turns_on_gpu(actions: Sequence[Callable[[], Any]], rounds: int, groups: ProcessGroups) -> list[list[float]]:
    meeting = torch.zeros(1, device=groups.device)
    events = []
    for _ in range(rounds):
        for action in actions:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            dist.all_reduce(meeting, group=groups.tensor.group)  # the ranks' streams meet; the host runs ahead
            begin.record()
            action()
            end.record()
            events.append((begin, end))
    torch.cuda.synchronize(groups.device)
    times = [begin.elapsed_time(end) / 1e3 for begin, end in events]
    return [times[start : start + len(actions)] for start in range(0, len(times), len(actions))]


def _slowest(times: list[list[float]], groups: ProcessGroups) -> list[list[float]]:
    """Each call's time on the rank where it took longest: the same on every rank."""
    shared = torch.tensor(times, dtype=torch.float64, device=groups.device)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=groups.tensor.group)
    return shared.tolist()
