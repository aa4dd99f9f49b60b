"""The checking mode of ``record``: ranks out of step are reported by all of them, in one line, before a hang."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from argonne.models import ArgonneConfig, ArgonneModel
from argonne.parallel import (
    Axis,
    Collective,
    CollectiveMismatch,
    Layout,
    ProcessGroups,
    complete_gradients,
    global_gradient_norm,
    record,
)
from argonne.parallel.communication import agreement, collectives, recording
from argonne.parallel.communication.collectives import Pending, all_reduce, broadcast, gather_objects, start_all_reduce
from tests.pool import RankPool

WITHIN = 10.0  # seconds, from the beginning of the block to the report
TWO, FOUR = Layout(tensor=2), Layout(data=2, tensor=2)

CONFIG = ArgonneConfig(
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=30,
    intermediate_size=16,
    max_position_embeddings=16,
)


class Step:
    """A training step of a small model."""

    def __init__(self, groups: ProcessGroups) -> None:
        self.groups = groups
        self.model = ArgonneModel(CONFIG, groups)
        self.model.initialise(seed=1)
        self.parameters = self.model.sharded_parameters()
        generator = torch.Generator().manual_seed(groups.data.rank)
        self.ids = torch.randint(0, CONFIG.vocab_size, (2, 6), generator=generator)

    def __call__(self) -> list[Tensor]:
        """The loss, the norm, its sum over the tensor group (the last call of the block) and every gradient."""
        loss = self.model.loss(self.ids, self.ids.flip(0), "sum")
        loss.backward()
        complete_gradients(self.parameters, self.groups)
        norm = global_gradient_norm(self.parameters, self.groups)
        gradients = [sharded.parameter.grad for sharded in self.parameters if sharded.parameter.grad is not None]
        return [loss.detach(), norm, all_reduce(norm.clone(), self.groups.tensor), *gradients]


@contextmanager
def planted(fault: str, groups: ProcessGroups, at: int, faulty: bool) -> Iterator[None]:
    """All-reduce ``at`` of the block goes wrong on the faulty rank."""
    count = itertools.count()
    real = start_all_reduce

    def start(tensor: Tensor, axis: Axis, site: str | None = None, *, wait: bool = False) -> Pending:
        if axis.group is None or next(count) != at:
            return real(tensor, axis, site, wait=wait)
        if fault == "swapped order":  # with a barrier
            if faulty:
                collectives.barrier(groups.world)
            pending = real(tensor, axis, site, wait=wait)
            if not faulty:
                collectives.barrier(groups.world)
            return pending
        if faulty:
            if fault == "missing call":
                return Pending(tensor)
            if fault == "wrong shape":
                tensor = torch.cat([tensor.flatten(), tensor.flatten()])
            elif fault == "wrong dtype":
                tensor = tensor.half()
            elif fault == "wrong group":
                axis = groups.data if groups.data.size > 1 else groups.world
        return real(tensor, axis, site, wait=wait)

    with mock.patch.object(collectives, "start_all_reduce", start):
        yield


def usable(groups: ProcessGroups) -> bool:
    """Whether the ranks are still in step: nothing that one of them has sent waits for another."""
    ranks = groups.world.size
    found = all_reduce(torch.tensor([float(groups.world.rank)]), groups.world)
    gathered = gather_objects(groups.tensor.rank, groups.tensor)
    return found.item() == ranks * (ranks - 1) / 2 and gathered == list(range(groups.tensor.size))


def clean_step(groups: ProcessGroups) -> list[Collective]:
    step = Step(groups)
    with record(step.model) as log:
        step()
    return log.collectives


Report = tuple[str | None, float, bool]


def faulty_step(groups: ProcessGroups, fault: str, at: int, faulty_rank: int) -> Report:
    """What is raised, after how long, and whether the ranks are usable."""
    step = Step(groups)
    began, message = time.monotonic(), None
    with planted(fault, groups, at, groups.world.rank == faulty_rank):
        try:
            with record(step.model, check=groups):
                step()
        except CollectiveMismatch as error:
            message = str(error)
    elapsed = time.monotonic() - began
    return message, elapsed, usable(groups)


def the_one_report(reports: list[Report]) -> str:
    messages = {message for message, *_ in reports}
    assert len(messages) == 1, f"the ranks' reports differ: {messages}"
    (message,) = messages
    assert message is not None, "no rank has noticed"
    assert "\n" not in message
    assert message.startswith("the ranks are out of step at collective ")
    for rank, (_, elapsed, is_usable) in enumerate(reports):
        assert elapsed < WITHIN, f"rank {rank} took {elapsed:.1f} s"
        assert is_usable, f"rank {rank} has been sent something"
    return message


FAULTS = ["missing call", "swapped order", "wrong shape", "wrong dtype", "wrong group"]
PLACES = ["forward of a block", "backward of a block", "last call"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported_by_both_ranks_in_the_same_line_and_nothing_is_sent(
    ranks: RankPool, fault: str, faulty: int, place: str
) -> None:
    log = ranks.run(TWO, clean_step)[faulty]
    at, due = find(log, place)
    reduced = [c for c in log if c.op == "all_reduce"]
    instead = {
        "missing call": str(reduced[at + 1]) if at + 1 < len(reduced) else "the end of the block",
        "swapped order": "barrier over world (ranks 0, 1) (outside)",
        "wrong shape": str(replace(due, shape=(2 * torch.Size(due.shape).numel(),))),
        "wrong dtype": str(replace(due, dtype=torch.float16)),
        "wrong group": str(replace(due, axis="world")),
    }[fault]
    if fault == "swapped order" and due.phase == "forward":
        instead = f"barrier over world (ranks 0, 1) at {due.module} (forward)"
    message = the_one_report(ranks.run(TWO, faulty_step, fault, at, faulty))
    said = [f"rank {rank}: {instead if rank == faulty else due}" for rank in (0, 1)]
    assert message == f"the ranks are out of step at collective {log.index(due) + 1} of ranks 0, 1: {'; '.join(said)}"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("faulty", range(4))
@pytest.mark.parametrize("fault", ["missing call", "wrong group"])
def test_a_planted_fault_in_one_group_is_reported_by_the_ranks_of_all_groups(
    ranks: RankPool, fault: str, faulty: int, place: str
) -> None:
    at, due = find(ranks.run(FOUR, clean_step)[faulty], place)
    message = the_one_report(ranks.run(FOUR, faulty_step, fault, at, faulty))
    # What another rank waits for in vain, or (if ranks meet that should not) what has been called in its place.
    over_data = str(replace(due, axis="data", ranks=(faulty % 2, faulty % 2 + 2)))
    assert str(due) in message or (fault == "wrong group" and over_data in message)
    if fault == "missing call" and place == "last call":
        assert f": rank {faulty} will not come: " in message
        assert re.search(rf"ranks? [\d, ]*{faulty}[\d, ]*: the end of the block", message)


def find(log: list[Collective], place: str) -> tuple[int, Collective]:
    """The number among all all-reduces of the one at ``place``, and itself, which is what its report must say."""
    reduced = [c for c in log if c.op == "all_reduce"]
    if place == "last call":
        at, text = len(reduced) - 1, "all_reduce [] float64 over tensor (ranks {}) (outside)"
    else:
        phase, layer = place.split()[0], {"forward": "self_attn.o_proj", "backward": "mlp.gate_up_proj"}
        module = f"model.layers.1.{layer[phase]}"
        (at,) = (i for i, c in enumerate(reduced) if c.module == module)
        text = f"all_reduce [12, 8] float32 over tensor (ranks {{}}) at {module} ({phase})"
    assert str(reduced[at]) == text.format(", ".join(map(str, reduced[at].ranks)))
    return at, reduced[at]


def compared(groups: ProcessGroups) -> tuple[bool, bool, bool]:
    free, checked = Step(groups), Step(groups)
    with record(free.model) as plain:
        expected = free()
    with record(checked.model, check=groups) as log:
        found = checked()

    def timeless(entries: list[Collective]) -> list[Collective]:
        return [replace(entry, started=0.0, finished=0.0) for entry in entries]

    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    ordered = all(entry.started <= entry.finished < float("inf") for entry in log.collectives)
    return same, timeless(log.collectives) == timeless(plain.collectives), ordered


@pytest.mark.parametrize("layout", [TWO, replace(TWO, sequence_parallel=True), FOUR, Layout(tensor=4)])
def test_ranks_in_step_get_the_same_bits_and_the_same_log_as_without_checking(ranks: RankPool, layout: Layout) -> None:
    assert ranks.run(layout, compared) == [(True, True, True)] * layout.world_size


def attempt(groups: ProcessGroups, act: Callable[[], Any], patience: float) -> Report:
    began, message = time.monotonic(), None
    try:
        with record(check=groups, patience=patience):
            act()
    except CollectiveMismatch as error:
        message = str(error)
    return message, time.monotonic() - began, usable(groups)


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
        collectives.barrier(groups.world)
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
    collectives.barrier(groups.world)
    found = dist.distributed_c10d._get_default_store().num_keys()
    collectives.barrier(groups.world)
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
            collectives.barrier(groups.world)
    return elapsed, before, highest, after, keys_at_rest(groups)


def test_two_hundred_collectives_take_seconds(ranks: RankPool) -> None:
    for elapsed, *_ in ranks.run(TWO, many, 100):
        assert elapsed < 20.0  # 1 to 2 on an idle machine


@pytest.mark.parametrize("layout", [TWO, FOUR])
def test_the_keys_in_the_store_are_few_and_none_is_left(ranks: RankPool, layout: Layout) -> None:
    for _, before, highest, after, later in ranks.run(layout, many, 25):
        assert highest - before < 10 * layout.world_size
        assert before == after == later
