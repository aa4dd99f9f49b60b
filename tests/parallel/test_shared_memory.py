"""Sums in shared memory: in rank order, the same on every rank, one after the other however ranks are delayed."""

from __future__ import annotations

import time

import pytest
import torch

from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.communication import recording
from argonne.parallel.communication.reduction import sum_over
from argonne.parallel.communication.shared_memory import CAPACITY, share_memory, sharing_memory
from tests.pool import RankPool


def part(rank: int, number: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(3, count, generator=torch.Generator().manual_seed(10 * number + rank), dtype=dtype)


def summed(groups: ProcessGroups) -> list[torch.Tensor]:
    """Many sums in a row, with a rank that comes late here and there, and some that are too large."""
    axis = sharing_memory(groups).tensor
    assert axis.shared is not None
    found = []
    for number in range(60):
        count = CAPACITY if number % 20 == 7 else 1 + number % 5
        mine = part(axis.rank, number, count, torch.float64 if number % 3 else torch.float32)
        if number % 7 == axis.rank:
            time.sleep(0.003)
        with recording.record() as log:
            total = sum_over(mine, axis)
        assert [entry.op for entry in log.collectives] == ["all_reduce"]
        assert total.data_ptr() == mine.data_ptr()
        if count != CAPACITY:
            found.append(total)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_those_of_the_ranks_in_their_order(ranks: RankPool, size: int) -> None:
    results = ranks.run(Layout(tensor=size), summed)
    numbers = [number for number in range(60) if number % 20 != 7]
    for rank, found in enumerate(results):
        for number, total in zip(numbers, found, strict=True):
            dtype = torch.float64 if number % 3 else torch.float32
            expected = part(0, number, 1 + number % 5, dtype)
            for other in range(1, size):
                expected = expected + part(other, number, 1 + number % 5, dtype)
            assert torch.equal(total, expected), f"rank {rank}, sum {number}"


def test_a_process_alone_shares_nothing() -> None:
    groups = ProcessGroups.single()
    assert share_memory(groups.tensor) is None
    assert sharing_memory(groups) == groups
