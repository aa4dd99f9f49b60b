"""Exchanges in shared memory: in rank order, the same on every rank, one after the other however ranks are delayed."""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.communication import recording, shared_memory
from argonne.parallel.communication.collectives import all_gather, broadcast
from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.reduction import sum_array, sum_over
from argonne.parallel.communication.shared_memory import CAPACITY, SharedMemory, share_memory, sharing_memory
from tests.pool import RankPool

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
"""Of which NumPy has but two."""


def part(rank: int, number: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * number + rank)
    return torch.randn(3, count, generator=generator, dtype=torch.float64).to(dtype)


def test_gathering_and_broadcasting_too(ranks: RankPool) -> None:
    for rank, found in enumerate(ranks.run(Layout(tensor=3), exchanged)):
        for number, (joined, sent) in enumerate(found):
            parts = [part(other, number, 1 + number, torch.float64) for other in range(3)]
            assert torch.equal(joined, torch.stack(parts)), f"rank {rank}, exchange {number}"
            assert torch.equal(sent, parts[number % 3]), f"rank {rank}, exchange {number}"


def exchanged(groups: ProcessGroups) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gathered and broadcast in turns, over the axis and over the job that has no other ranks."""
    groups = sharing_memory(groups)
    assert groups.world.shared is groups.tensor.shared is not None
    found = []
    for number in range(6):
        mine = part(groups.tensor.rank, number, 1 + number, torch.float64)
        with recording.record() as log:
            found.append((all_gather(mine, groups.tensor), broadcast(mine, groups.world, number % 3)))
        assert [entry.op for entry in log.collectives] == ["all_gather", "broadcast"]
    return found


def lonely(process: int) -> SharedMemory:
    """The first of two ranks, of which the other never writes."""
    return SharedMemory(mmap.mmap(-1, SharedMemory.bytes(2)), Axis("tensor", 2, 0, ranks=(4, 7)), [0, process])


def test_a_rank_that_has_ended_is_not_waited_for() -> None:
    with subprocess.Popen(["sleep", "0.01"]) as other:
        shared = lonely(os.pidfd_open(other.pid))
        began = time.monotonic()
        with pytest.raises(dist.DistError, match="rank 7 has ended"):
            shared.sum(torch.ones(3))
    assert time.monotonic() - began < 5


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_PATIENCE", 0.1)
    shared = lonely(os.pidfd_open(os.getpid()))
    with pytest.raises(dist.DistError, match=r"rank 7 has not come within 0.1 s"):
        shared.broadcast(torch.ones(3), 1)


def summed(groups: ProcessGroups) -> list[torch.Tensor]:
    """Many sums in a row, with a rank that comes late here and there, and some that are too large."""
    axis = sharing_memory(groups).tensor
    assert axis.shared is not None
    found = []
    for number in range(60):
        count = CAPACITY if number % 20 == 7 else 1 + number % 5
        total = part(axis.rank, number, count, DTYPES[number % 3])
        if number % 7 == axis.rank:
            time.sleep(0.003)
        with recording.record() if number % 2 else nullcontext() as log:
            if number % 3:
                sum_array(total.numpy(), axis)  # by another way where nobody records
            else:
                sum_over(total, axis)
        assert log is None or [entry.op for entry in log.collectives] == ["all_reduce"]
        if count != CAPACITY:
            found.append(total)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_those_of_the_ranks_in_their_order(ranks: RankPool, size: int) -> None:
    results = ranks.run(Layout(tensor=size), summed)
    numbers = [number for number in range(60) if number % 20 != 7]
    for rank, found in enumerate(results):
        for number, total in zip(numbers, found, strict=True):
            dtype = DTYPES[number % 3]
            expected = part(0, number, 1 + number % 5, dtype)
            for other in range(1, size):
                expected = expected + part(other, number, 1 + number % 5, dtype)
            assert torch.equal(total, expected), f"rank {rank}, sum {number}"


def test_a_process_alone_shares_nothing() -> None:
    groups = ProcessGroups.single()
    assert share_memory(groups.tensor) is None
    assert sharing_memory(groups) == groups
