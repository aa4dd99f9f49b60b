"""Each collective equals the arithmetic on whole tensors, and a refusal of one rank reaches all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from argonne.parallel import ArgonneError, Layout, ProcessGroups
from argonne.parallel.communication.collectives import (
    all_gather,
    all_reduce,
    broadcast,
    collectively,
    gather_objects,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from tests.parallel.operands import SIZES, values
from tests.pool import RankPool


def plain_collectives(groups: ProcessGroups, table: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[int]]:
    axis = groups.tensor
    mine = table[axis.rank]
    summed = mine.clone()
    assert all_reduce(summed, axis) is summed
    gathered = all_gather(mine.t(), axis)
    scattered = reduce_scatter(mine, axis)
    sent = [broadcast(mine.clone(), axis, source) for source in range(axis.size)]
    return summed, gathered, scattered, sent, gather_objects(10 * axis.rank, axis)


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_plain_collectives_equal_the_arithmetic_on_whole_tensors(ranks: RankPool, size: int) -> None:
    table = values(size, 3 * size, 5, kind="integers", seed=size)
    results = ranks.run(Layout(tensor=size), plain_collectives, table)
    for rank, (summed, gathered, scattered, sent, objects) in enumerate(results):
        assert torch.equal(summed, table.sum(0)), f"all_reduce on rank {rank}"
        assert torch.equal(gathered, table.transpose(1, 2)), f"all_gather on rank {rank}"
        assert torch.equal(scattered, table.sum(0)[3 * rank : 3 * rank + 3]), f"reduce_scatter on rank {rank}"
        for source, received in enumerate(sent):
            assert torch.equal(received, table[source]), f"broadcast from {source} on rank {rank}"
        assert objects == [10 * other for other in range(size)]


def several_in_flight(groups: ProcessGroups, table: Tensor) -> list[Tensor]:
    axis = groups.tensor
    mine = table[axis.rank]
    started = [
        start_all_reduce(mine.clone(), axis),
        start_all_gather(mine, axis),
        start_reduce_scatter(mine, axis),
        start_all_reduce(2 * mine, axis),
    ]
    return [pending.wait() for pending in reversed(started)]


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_collectives_in_flight_together_do_not_mix(ranks: RankPool, size: int) -> None:
    table = values(size, 3 * size, 5, kind="integers", seed=size)
    for rank, found in enumerate(ranks.run(Layout(tensor=size), several_in_flight, table)):
        total = table.sum(0)
        expected = [2 * total, total[3 * rank : 3 * rank + 3], table.flatten(0, 1), total]
        for name, one, other in zip(("second sum", "part of the sum", "all", "sum"), found, expected, strict=True):
            assert torch.equal(one, other), f"{name} on rank {rank}"


def gather_nothing(groups: ProcessGroups) -> tuple[int, ...]:
    return tuple(all_gather(torch.empty(3, 0), groups.tensor).shape)


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_all_gather_of_tensors_without_elements_keeps_their_shape(ranks: RankPool, size: int) -> None:
    for shape in ranks.run(Layout(tensor=size), gather_nothing):
        assert shape == (size, 3, 0)


def along_both_axes(groups: ProcessGroups) -> tuple[list[float], list[float], float, float]:
    mine = torch.tensor(float(groups.world.rank))
    from_last = broadcast(mine.clone(), groups.tensor, source=1), broadcast(mine.clone(), groups.data, source=1)
    rows = all_gather(mine, groups.tensor).tolist(), all_gather(mine, groups.data).tolist()
    return *rows, from_last[0].item(), from_last[1].item()


def test_collectives_of_one_axis_stay_within_it(ranks: RankPool) -> None:
    results = ranks.run(Layout(data=2, tensor=2), along_both_axes)
    assert results == [
        ([0, 1], [0, 2], 1, 2),
        ([0, 1], [1, 3], 1, 3),
        ([2, 3], [0, 2], 3, 2),
        ([2, 3], [1, 3], 3, 3),
    ]


def refuse_on(groups: ProcessGroups, bad: list[int]) -> tuple[str, int | str]:
    def action() -> int:
        if groups.tensor.rank in bad:
            raise ArgonneError(f"file {groups.tensor.rank} is bad")
        return groups.tensor.rank

    try:
        return "done", collectively(action, groups.tensor)
    except ArgonneError as error:
        return "refused", str(error)


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_a_refusal_of_any_rank_is_raised_on_every_rank(ranks: RankPool, size: int) -> None:
    layout = Layout(tensor=size)
    assert ranks.run(layout, refuse_on, []) == [("done", rank) for rank in range(size)]
    for bad in range(size):
        assert ranks.run(layout, refuse_on, [bad]) == [("refused", f"file {bad} is bad")] * size
    # When several refuse, all ranks tell the same one.
    assert ranks.run(layout, refuse_on, list(range(size))) == [("refused", "file 0 is bad")] * size
