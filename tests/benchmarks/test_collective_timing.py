"""What the benchmarks of collectives rest on: the check of results, whose time counts, the definitions."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from argonne.parallel import Layout, ProcessGroups
from benchmarks.collective_timing import (
    ALL_GATHER,
    ALL_REDUCE,
    OPERATIONS,
    REDUCE_SCATTER,
    Budget,
    count_wrong,
    exact_period,
    measure,
)
from benchmarks.overlap import hidden_fraction
from tests.pool import RankPool


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_bus_factors_are_those_of_nccl_tests(ranks: int) -> None:
    assert ALL_REDUCE.bus_factor(ranks) == 2 * (ranks - 1) / ranks
    assert ALL_GATHER.bus_factor(ranks) == REDUCE_SCATTER.bus_factor(ranks) == (ranks - 1) / ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [2, 3, 8, 64, 256])
def test_operands_sum_exactly(ranks: int, dtype: torch.dtype) -> None:
    largest = ranks * (exact_period(ranks, dtype) - 1)
    assert largest >= ranks  # more than zeros
    exact = torch.arange(largest - 1, largest + 1).to(dtype)
    assert exact.long().tolist() == [largest - 1, largest]


def test_hidden_fraction_of_perfect_none_and_harmful_overlap() -> None:
    assert hidden_fraction(4.0, 1.0, 4.0) == 1
    assert hidden_fraction(4.0, 1.0, 5.0) == 0
    assert hidden_fraction(1.0, 4.0, 6.0) == -1


def corrupted_counts(groups: ProcessGroups) -> list[int]:
    """The wrong elements that the check finds in results spoilt in a known way."""

    def spoilt_sum(full: torch.Tensor, part: torch.Tensor, axis: Any) -> None:
        ALL_REDUCE.call(full, part, axis)
        if axis.rank == 1:
            full[[3, 700]] += 1

    def swapped_parts(full: torch.Tensor, part: torch.Tensor, axis: Any) -> None:
        ALL_GATHER.call(full, part, axis)
        full.copy_(full.roll(part.numel()))

    def another_ranks_part(full: torch.Tensor, part: torch.Tensor, axis: Any) -> None:
        dist.all_reduce(full, group=axis.group)
        part.copy_(full.chunk(axis.size)[1 - axis.rank])

    def nothing(full: torch.Tensor, part: torch.Tensor, axis: Any) -> None:
        pass

    cases = [(operation, operation.call) for operation in OPERATIONS]
    cases += [(ALL_REDUCE, spoilt_sum), (ALL_GATHER, swapped_parts), (REDUCE_SCATTER, another_ranks_part)]
    cases += [(ALL_GATHER, nothing), (REDUCE_SCATTER, nothing)]
    full, part = torch.zeros(1000), torch.zeros(500)
    return [count_wrong(replace(operation, call=call), full, part, groups.tensor) for operation, call in cases]


def test_the_check_finds_what_is_wrong(ranks: RankPool) -> None:
    expected = [0, 0, 0, 2, 2000, 1000, 2000, 1000]
    assert ranks.run(Layout(tensor=2), corrupted_counts) == [expected, expected]


def slow_rank(groups: ProcessGroups) -> list[float]:
    timings = measure([lambda: time.sleep(0.02 * groups.tensor.rank), lambda: None], Budget(5, 2, 10.0), groups)
    return [timing.median for timing in timings]


def test_the_slowest_ranks_time_counts_on_every_rank(ranks: RankPool) -> None:
    first, second = ranks.run(Layout(tensor=2), slow_rank)
    assert first == second
    assert first[0] >= 0.02 > first[1]
