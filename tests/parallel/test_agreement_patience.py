"""The checking mode of ``record`` waits for slow ranks as long as its patience, and then names them."""

from __future__ import annotations

import time
from unittest import mock

import pytest
import torch

from argonne.parallel import CollectiveMismatch, ProcessGroups, record
from argonne.parallel.communication import agreement
from argonne.parallel.communication.collectives import all_reduce, barrier
from tests.parallel.agreeing import TWO, Report, attempt, the_one_report
from tests.pool import RankPool


def late(groups: ProcessGroups, rank: int, seconds: float, patience: float) -> Report:
    def act() -> None:
        all_reduce(torch.ones(3), groups.tensor)
        if groups.world.rank == rank:
            time.sleep(seconds)
        all_reduce(torch.ones(2), groups.tensor)

    return attempt(groups, act, patience)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_slow_rank_within_patience_is_waited_for(ranks: RankPool, rank: int) -> None:
    for message, elapsed, is_usable in ranks.run(TWO, late, rank, 0.5, 9.0):
        assert message is None
        assert elapsed >= 0.5
        assert is_usable


@pytest.mark.parametrize("rank", [0, 1])
def test_beyond_patience_every_rank_reports_where_each_is(ranks: RankPool, rank: int) -> None:
    message = the_one_report(ranks.run(TWO, late, rank, 0.8, 0.3))
    assert message == (
        f"the ranks are out of step at collective 2 of ranks 0, 1: rank {rank} did not come within 0.3 s: "
        + "; ".join(
            f"rank {r}: all_reduce [{3 if r == rank else 2}] float32 over tensor (ranks 0, 1) (outside)" for r in (0, 1)
        )
    )


def on_the_brink(groups: ProcessGroups, patience: float, delays: list[float]) -> list[bool]:
    """Whether this rank raised, for each delay of rank 1."""
    raised = []
    for delay in delays:
        barrier(groups.world)
        try:
            with record(check=groups, patience=patience):
                if groups.world.rank == 1:
                    time.sleep(delay)
                all_reduce(torch.ones(2), groups.tensor)
            raised.append(False)
        except CollectiveMismatch:
            raised.append(True)
    return raised


def test_a_rank_that_comes_just_as_patience_ends_is_waited_for_by_all_or_by_none(ranks: RankPool) -> None:
    patience = 0.1
    delays = [patience + 0.003 * i for i in range(-1, 19)]  # the others look every 50 ms
    mine, others = ranks.run(TWO, on_the_brink, patience, delays)
    assert mine == others


def absent(groups: ProcessGroups, seconds: float, edge_patience: float) -> Report:
    """Rank 1 enters the block late."""
    if groups.world.rank == 1:
        time.sleep(seconds)
    with mock.patch.object(agreement, "_EDGE_PATIENCE", edge_patience):
        return attempt(groups, lambda: all_reduce(torch.ones(2), groups.tensor), 0.2)


def test_ranks_may_enter_the_block_at_different_times(ranks: RankPool) -> None:
    for message, _, is_usable in ranks.run(TWO, absent, 0.6, 60.0):
        assert message is None
        assert is_usable


def test_a_rank_that_does_not_enter_the_block_is_named(ranks: RankPool) -> None:
    assert the_one_report(ranks.run(TWO, absent, 0.6, 0.3)) == (
        "the ranks are out of step at collective 0 of ranks 0, 1: rank 1 did not come within 0.3 s: "
        "rank 0: the start of the block; rank 1: not yet in the block"
    )


def left_early(groups: ProcessGroups, seconds: float, edge_patience: float) -> Report:
    """Rank 1 has much to do after its last collective."""

    def act() -> None:
        if groups.world.rank == 1:
            time.sleep(seconds)

    with mock.patch.object(agreement, "_EDGE_PATIENCE", edge_patience):
        return attempt(groups, act, 0.2)


def test_ranks_may_leave_the_block_at_different_times(ranks: RankPool) -> None:
    for message, elapsed, is_usable in ranks.run(TWO, left_early, 0.6, 60.0):
        assert message is None
        assert elapsed >= 0.5
        assert is_usable


def test_a_rank_that_does_not_leave_the_block_is_named(ranks: RankPool) -> None:
    assert the_one_report(ranks.run(TWO, left_early, 0.6, 0.3)) == (
        "the ranks are out of step at collective 1 of ranks 0, 1: rank 1 did not come within 0.3 s: "
        "rank 0: the end of the block; rank 1: the start of the block"
    )
