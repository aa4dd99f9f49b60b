"""The checking mode of ``record``: ranks out of step are reported by all of them, in one line, before a hang."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from argonne.parallel import CollectiveMismatch, Layout, ProcessGroups, record
from argonne.parallel.communication import recording
from argonne.parallel.communication.collectives import all_reduce, barrier, broadcast
from tests.parallel.agreeing import FOUR, TWO, Report, attempt, the_one_report, usable
from tests.pool import RankPool


def in_two_groups(groups: ProcessGroups) -> Report:
    """Ranks 0 and 1 differ; rank 2 waits for rank 3 when that is found."""

    def act() -> None:
        if groups.world.rank == 3:
            time.sleep(0.7)
        found = all_reduce(torch.ones(3 if groups.world.rank == 1 else 2), groups.tensor)
        assert groups.data.rank == 1
        assert found.tolist() == [2.0, 2.0]

    return attempt(groups, act, 5.0)


def test_ranks_in_step_go_on_together_and_are_told_of_the_others_when_they_would_meet_them(ranks: RankPool) -> None:
    message = the_one_report(ranks.run(FOUR, in_two_groups))
    assert message == (
        "the ranks are out of step at collective 1 of ranks 0, 1: "
        "rank 0: all_reduce [2] float32 over tensor (ranks 0, 1) (outside); "
        "rank 1: all_reduce [3] float32 over tensor (ranks 0, 1) (outside)"
    )


def another_error(groups: ProcessGroups, rank: int, at_the_end: bool) -> tuple[str, float, bool]:
    began = time.monotonic()
    try:
        with record(check=groups):
            all_reduce(torch.ones(2), groups.tensor)
            if groups.world.rank == rank:
                raise KeyError("no such\nshard")
            if not at_the_end:
                all_reduce(torch.ones(2), groups.world)
    except (CollectiveMismatch, KeyError) as error:
        found = f"{type(error).__name__}: {error}"
    return found, time.monotonic() - began, usable(groups)


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize(("layout", "rank"), [(TWO, 0), (TWO, 1), (FOUR, 0), (FOUR, 3)])
def test_an_error_on_one_rank_is_its_own_and_the_others_are_told_at_once(
    ranks: RankPool, layout: Layout, rank: int, at_the_end: bool
) -> None:
    results = ranks.run(layout, another_error, rank, at_the_end)
    others = {found for r, (found, *_) in enumerate(results) if r != rank}
    assert results[rank][0].startswith("KeyError: ")
    assert len(others) == 1
    (told,) = others
    assert told.startswith("CollectiveMismatch: the ranks are out of step at collective ")
    assert f"rank {rank} will not come: " in told
    assert f"rank {rank}: left the block with KeyError: 'no such\\nshard'" in told
    assert "\n" not in told
    for r, (_, elapsed, is_usable) in enumerate(results):
        assert elapsed < 4.0, f"rank {r} took {elapsed:.1f} s"
        assert is_usable


class _Dead:
    """A store whose host is gone."""

    def __getattr__(self, name: str) -> Any:
        raise dist.DistNetworkError("connection was likely closed")


def with_a_dead_store(groups: ProcessGroups) -> tuple[str, bool]:
    try:
        with record(check=groups):
            assert recording._recorder is not None
            assert recording._recorder.agreement is not None
            recording._recorder.agreement.store = _Dead()
            raise KeyError("the real error")
    except KeyError as error:
        return str(error), recording._recorder is None


def test_a_store_that_is_gone_hides_no_error(ranks: RankPool) -> None:
    assert ranks.run(TWO, with_a_dead_store) == [("'the real error'", True)] * 2


def again(groups: ProcessGroups) -> list[bool]:
    """Whether each of several blocks of one process raised."""
    raised = []
    for width in (2, 2 + groups.world.rank, 2, 2 + groups.world.rank, 2):
        try:
            with record(check=groups):
                all_reduce(torch.ones(2), groups.world)
                all_reduce(torch.ones(width), groups.tensor)
            raised.append(False)
        except CollectiveMismatch:
            raised.append(True)
    return raised


def test_a_block_knows_nothing_of_those_before_it(ranks: RankPool) -> None:
    # Ranks that have been in other jobs before, and in different ones, come together.
    for layout in (TWO, Layout(tensor=4), TWO):
        assert ranks.run(layout, again) == [[False, True, False, True, False]] * layout.world_size


def same_ranks(groups: ProcessGroups) -> Report:
    def act() -> None:
        first, second = groups.tensor, groups.world
        if groups.world.rank == 1:
            first, second = second, first
        all_reduce(torch.ones(2), first)
        all_reduce(torch.ones(2), second)

    return attempt(groups, act, 5.0)


def test_the_order_over_two_axes_of_the_same_ranks_is_compared(ranks: RankPool) -> None:
    assert the_one_report(ranks.run(TWO, same_ranks)) == (
        "the ranks are out of step at collective 1 of ranks 0, 1: "
        "rank 0: all_reduce [2] float32 over tensor (ranks 0, 1) (outside); "
        "rank 1: all_reduce [2] float32 over world (ranks 0, 1) (outside)"
    )


def crossed(groups: ProcessGroups, data_first: tuple[int, ...]) -> Report:
    def act() -> None:
        axes = [groups.tensor, groups.data]
        for axis in reversed(axes) if groups.world.rank in data_first else axes:
            all_reduce(torch.ones(2), axis)

    return attempt(groups, act, 1.0)


def test_ranks_may_go_through_their_groups_in_different_orders(ranks: RankPool) -> None:
    for message, _, is_usable in ranks.run(FOUR, crossed, (0,)):
        assert message is None
        assert is_usable


def test_a_cycle_of_ranks_that_wait_for_each_other_is_reported(ranks: RankPool) -> None:
    message = the_one_report(ranks.run(FOUR, crossed, (0, 3)))
    assert " did not come within 1 s: " in message
    for rank, axis, peers in [(0, "data", "0, 2"), (1, "tensor", "0, 1"), (2, "tensor", "2, 3"), (3, "data", "1, 3")]:
        assert f"rank {rank}: all_reduce [2] float32 over {axis} (ranks {peers}) (outside)" in message


def keys_at_rest(groups: ProcessGroups) -> int:
    """The number of keys in the job's store while no rank is in a block."""
    barrier(groups.world)
    found = dist.distributed_c10d._get_default_store().num_keys()
    barrier(groups.world)
    return found


def many(groups: ProcessGroups, count: int) -> tuple[float, int, int, int, int]:
    """Seconds; the keys of the store before, at most within, and after a block; and after ten more blocks."""
    with record(check=groups):
        pass
    before = highest = keys_at_rest(groups)
    store = dist.distributed_c10d._get_default_store()
    began = time.monotonic()
    with record(check=groups) as log:
        for _ in range(count):
            all_reduce(torch.ones(2), groups.tensor)
            broadcast(torch.ones(2), groups.world)
            highest = max(highest, store.num_keys() if groups.is_first else 0)
    elapsed = time.monotonic() - began
    assert len(log.collectives) == 2 * count
    after = keys_at_rest(groups)
    for _ in range(10):
        with record(check=groups):
            all_reduce(torch.ones(2), groups.data)
            barrier(groups.world)
    return elapsed, before, highest, after, keys_at_rest(groups)


def test_two_hundred_collectives_take_seconds(ranks: RankPool) -> None:
    for elapsed, *_ in ranks.run(TWO, many, 100):
        assert elapsed < 20.0  # 1 to 2 on an idle machine


@pytest.mark.parametrize("layout", [TWO, FOUR])
def test_the_keys_in_the_store_are_few_and_none_is_left(ranks: RankPool, layout: Layout) -> None:
    for _, before, highest, after, later in ranks.run(layout, many, 25):
        assert highest - before < 10 * layout.world_size
        assert before == after == later
