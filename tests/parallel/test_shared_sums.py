"""Sums in shared memory: those of the ranks in their order, whatever is in flight; nobody waits for ever."""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.communication import recording, shared_memory, shared_sums
from argonne.parallel.communication.collectives import Pending, start_all_gather
from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.isolation import isolated
from argonne.parallel.communication.reduction import start_sum, start_sum_and_scatter, sum_over
from argonne.parallel.communication.shared_sums import CHUNK, PLACES, SharedSums, share_sums, sharing_sums
from tests.pool import RankPool

SMALL = 4096
"""Bytes of a chunk, here."""
LENGTHS = (1, 0, 5, SMALL // 4, SMALL // 4 + 3, (PLACES + 2) * SMALL // 4 + 1, 7)
"""Elements of float32: in one chunk, in none, in more of them than there are places for."""


def part(rank: int, number: int, count: int) -> Tensor:
    """What a rank has: numbers whose sum depends on the order."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    return torch.randn(count, generator=generator) * 10.0 ** (rank + number % 2)


def in_order(number: int, size: int, count: int) -> Tensor:
    total = part(0, number, count)
    for rank in range(1, size):
        total = total + part(rank, number, count)
    return total


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_begun_is_exact_in_whatever_order_it_is_waited_for(ranks: RankPool, size: int) -> None:
    ranks.run(Layout(tensor=size), check_exchanges)


def check_exchanges(groups: ProcessGroups) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_sums, "CHUNK", SMALL)
        exchange(sharing_sums(groups).tensor)


def exchange(axis: Axis) -> None:
    assert axis.sums is not None
    rank, size = axis.rank, axis.size
    generator = torch.Generator().manual_seed(1)  # the same on all ranks
    pending: list[tuple[Pending, Tensor]] = []
    for number in range(42):
        count = LENGTHS[number % len(LENGTHS)]
        mine = part(rank, number, count)
        if number % 7 == rank:
            time.sleep(0.002)  # it comes late
        if number % 3 == 0:
            begun = start_sum(mine, axis)
            assert begun.result.data_ptr() == mine.data_ptr()
            expected = in_order(number, size, count)
        elif number % 3 == 1:
            begun, expected = start_all_gather(mine, axis), torch.cat([part(r, number, count) for r in range(size)])
        else:
            whole = part(rank, number, count * size).view(size * count)
            begun = start_sum_and_scatter(whole, axis)
            expected = in_order(number, size, count * size)[rank * count : (rank + 1) * count]
        pending.append((begun, expected))
        while pending and float(torch.rand(1, generator=generator)) < 0.5:
            check(pending.pop(int(torch.randint(len(pending), (1,), generator=generator))))
    for each in pending:
        check(each)


def check(each: tuple[Pending, Tensor]) -> None:
    begun, expected = each
    assert torch.equal(begun.wait(), expected)


def test_two_ranks_have_the_bits_of_gloo_and_the_log_does_not_know_the_difference(ranks: RankPool) -> None:
    for ours, theirs in ranks.run(Layout(tensor=2), both_ways):
        for (a, entry), (b, other) in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), a.dtype
            assert entry == other
            assert entry[2] == a.nbytes


def both_ways(groups: ProcessGroups) -> list[list[tuple[Tensor, Any]]]:
    return [[summed(axis, dtype) for dtype in DTYPES] for axis in (sharing_sums(groups).tensor, groups.tensor)]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


def summed(axis: Axis, dtype: torch.dtype) -> tuple[Tensor, Any]:
    with recording.record() as log:
        total = sum_over(part(axis.rank, 3, 300_000).mul(9).to(dtype), axis)
    (entry,) = log.collectives
    return total, (entry.op, entry.shape, entry.bytes, entry.ranks, entry.is_async)


def test_an_isolated_rank_reaches_nobody(ranks: RankPool) -> None:
    ranks.run(Layout(tensor=2), alone_once)


def alone_once(groups: ProcessGroups) -> None:
    axis = sharing_sums(groups).tensor
    if axis.rank == 0:
        with isolated():
            assert torch.equal(sum_over(torch.ones(3), axis), torch.ones(3))
    assert torch.equal(sum_over(torch.ones(3), axis), torch.full((3,), 2.0))


def test_where_one_cannot_share_none_does(ranks: RankPool) -> None:
    assert ranks.run(Layout(tensor=2), without_memory) == [True, True]


def without_memory(groups: ProcessGroups) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        if groups.tensor.rank == 1:
            patch.setattr(shared_memory.os, "pidfd_open", lambda process: int("none"))
        return share_sums(groups.tensor) is None


def lonely(process: int, spins: int = 10) -> SharedSums:
    """The first of two ranks, of which the other never comes."""
    axis = Axis("tensor", 2, 0, ranks=(4, 7))
    return SharedSums(mmap.mmap(-1, SharedSums.bytes(2)), axis, [0, process], spins)


@pytest.mark.parametrize("length", [3, PLACES * CHUNK])
def test_a_rank_that_has_ended_is_named(length: int) -> None:
    with subprocess.Popen(["sleep", "0.01"]) as other:
        shared = lonely(os.pidfd_open(other.pid))
        began = time.monotonic()
        with pytest.raises(dist.DistError, match="rank 7 has ended"):
            shared.sum(torch.ones(length)).wait()
    assert time.monotonic() - began < 10


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_sums, "_PATIENCE", 0.1)
    begun = lonely(os.pidfd_open(os.getpid()), spins=0).gather(torch.ones(3), torch.ones(6))
    with pytest.raises(dist.DistError, match=r"rank 7 has not come within 0.1 s"):
        begun.wait()


def test_a_process_alone_shares_nothing() -> None:
    groups = ProcessGroups.single()
    assert share_sums(groups.tensor) is None
    assert sharing_sums(groups) == groups
