"""Each region function does what its name says forward, and its dual backward. Integers: every sum is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import (
    ArgonneError,
    Layout,
    ProcessGroups,
    copy_to_region,
    gather_from_region,
    reduce_from_region,
    scatter_to_region,
)
from argonne.parallel.collectives import (
    all_gather,
    all_reduce,
    broadcast,
    collectively,
    gather_objects,
    reduce_scatter,
)
from tests.pool import RankPool

SIZES = [1, 2, 4]  # at module scope: pytest then runs each size in one go, and ranks join a job once
REGION_FUNCTIONS = {
    "copy": copy_to_region,
    "reduce": reduce_from_region,
    "gather": gather_from_region,
    "scatter": scatter_to_region,
}


def integers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-50, 50, shape, generator=generator).float()


def apply_region(groups: ProcessGroups, name: str, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's output and input gradient; its input and output gradient are row ``rank`` of the tables."""
    rank = groups.tensor.rank
    # A transposed view: a collective on memory that is not contiguous must not mix the elements.
    given_input = inputs[rank].t().contiguous().t().requires_grad_()
    given_gradient = gradients[rank].t().contiguous().t()
    kept_input, kept_gradient = given_input.detach().clone(), given_gradient.clone()
    output = REGION_FUNCTIONS[name](given_input, groups.tensor)
    output.backward(given_gradient)
    assert torch.equal(given_input.detach(), kept_input), "the input was overwritten"
    assert torch.equal(given_gradient, kept_gradient), "the output's gradient was overwritten"
    assert given_input.grad is not None
    return output.detach().clone(), given_input.grad


@pytest.mark.parametrize("size", SIZES, scope="module")
@pytest.mark.parametrize("name", REGION_FUNCTIONS)
def test_region_function_and_its_backward_equal_the_arithmetic_on_whole_tensors(
    ranks: RankPool, name: str, size: int
) -> None:
    @given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
    def claim(rows: int, columns: int, seed: int) -> None:
        wide = size * columns
        shape_in, shape_out = {"gather": (columns, wide), "scatter": (wide, columns)}.get(name, (columns, columns))
        inputs = integers(size, rows, shape_in, seed=seed)
        gradients = integers(size, rows, shape_out, seed=seed + 1)
        forward: dict[str, Callable[[int], Tensor]] = {
            "copy": lambda rank: inputs[rank],
            "reduce": lambda rank: inputs.sum(0),
            "gather": lambda rank: torch.cat(list(inputs), dim=-1),
            "scatter": lambda rank: inputs[rank, :, rank * columns : (rank + 1) * columns],
        }
        backward: dict[str, Callable[[int], Tensor]] = {
            "copy": lambda rank: gradients.sum(0),
            "reduce": lambda rank: gradients[rank],
            "gather": lambda rank: gradients[rank, :, rank * columns : (rank + 1) * columns],
            "scatter": lambda rank: torch.cat(list(gradients), dim=-1),
        }
        results = ranks.run(Layout(tensor=size), apply_region, name, inputs, gradients)
        for rank, (output, gradient) in enumerate(results):
            assert torch.equal(output, forward[name](rank)), f"{name} forward on rank {rank}"
            assert torch.equal(gradient, backward[name](rank)), f"{name} backward on rank {rank}"

    claim()


@pytest.mark.parametrize("name", REGION_FUNCTIONS)
def test_region_function_over_one_process_returns_its_input(name: str) -> None:
    x = integers(3, 4, seed=0)
    assert REGION_FUNCTIONS[name](x, ProcessGroups.single().tensor) is x


def plain_collectives(groups: ProcessGroups, values: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[int]]:
    axis = groups.tensor
    mine = values[axis.rank]
    summed = mine.clone()
    assert all_reduce(summed, axis) is summed
    gathered = all_gather(mine.t(), axis)
    scattered = reduce_scatter(mine, axis)
    sent = [broadcast(mine.clone(), axis, source) for source in range(axis.size)]
    return summed, gathered, scattered, sent, gather_objects(10 * axis.rank, axis)


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_plain_collectives_equal_the_arithmetic_on_whole_tensors(ranks: RankPool, size: int) -> None:
    values = integers(size, 3 * size, 5, seed=size)
    results = ranks.run(Layout(tensor=size), plain_collectives, values)
    for rank, (summed, gathered, scattered, sent, objects) in enumerate(results):
        assert torch.equal(summed, values.sum(0)), f"all_reduce on rank {rank}"
        assert torch.equal(gathered, values.transpose(1, 2)), f"all_gather on rank {rank}"
        assert torch.equal(scattered, values.sum(0)[3 * rank : 3 * rank + 3]), f"reduce_scatter on rank {rank}"
        for source, received in enumerate(sent):
            assert torch.equal(received, values[source]), f"broadcast from {source} on rank {rank}"
        assert objects == [10 * other for other in range(size)]


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
