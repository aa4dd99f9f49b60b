"""Each region function does what its name says forward, and its dual backward. Integers: every sum is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import (
    ArgonneError,
    Axis,
    Layout,
    ProcessGroups,
    copy_to_region,
    gather_from_region,
    gather_from_sequence_region,
    reduce_from_region,
    reduce_scatter_to_sequence_region,
    scatter_to_region,
)
from tests.parallel.operands import SEEDS, SIZES
from tests.pool import RankPool

# What a rank has of every rank's tensor, stacked: the arithmetic on whole tensors.


def same(tensors: Tensor, rank: int, dim: int) -> Tensor:
    return tensors[rank]


def total(tensors: Tensor, rank: int, dim: int) -> Tensor:
    return tensors.sum(0)


def joined(tensors: Tensor, rank: int, dim: int) -> Tensor:
    return torch.cat(list(tensors), dim)


def own_part(tensors: Tensor, rank: int, dim: int) -> Tensor:
    return tensors[rank].chunk(len(tensors), dim)[rank]


def own_part_of_total(tensors: Tensor, rank: int, dim: int) -> Tensor:
    return tensors.sum(0).chunk(len(tensors), dim)[rank]


@dataclass(frozen=True)
class Pair:
    """A region function, what it is forward, and its dual."""

    function: Callable[[Tensor, Axis, int], Tensor]
    forward: Callable[[Tensor, int, int], Tensor]
    backward: Callable[[Tensor, int, int], Tensor]
    dims: tuple[int, ...] = (0,)


PAIRS = {
    "copy": Pair(lambda x, axis, _: copy_to_region(x, axis), same, total),
    "reduce": Pair(lambda x, axis, _: reduce_from_region(x, axis), total, same),
    "gather": Pair(gather_from_region, joined, own_part, dims=(0, 1, -1)),
    "scatter": Pair(scatter_to_region, own_part, joined, dims=(0, 1, -1)),
    "sequence gather": Pair(lambda x, axis, _: gather_from_sequence_region(x, axis), joined, own_part_of_total),
    "sequence scatter": Pair(lambda x, axis, _: reduce_scatter_to_sequence_region(x, axis), own_part_of_total, joined),
}
SHARES_OUT = (own_part, own_part_of_total)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    """Small enough that bfloat16 has the sum of 8 ranks exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-30, 31, shape, generator=generator).to(dtype)


def apply(groups: ProcessGroups, name: str, dim: int, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's output and input gradient; its input and output gradient are row ``rank`` of the tables."""
    rank = groups.tensor.rank
    # Transposed views: a collective on memory that is not contiguous must not mix the elements.
    own_input = inputs[rank].transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    own_gradient = gradients[rank].transpose(0, -1).contiguous().transpose(0, -1)
    kept_input, kept_gradient = own_input.detach().clone(), own_gradient.clone()
    output = PAIRS[name].function(own_input, groups.tensor, dim)
    output.backward(own_gradient)
    assert torch.equal(own_input.detach(), kept_input), "the input was overwritten"
    assert torch.equal(own_gradient, kept_gradient), "the output's gradient was overwritten"
    assert own_input.grad is not None
    return output.detach().clone(), own_input.grad


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("size", SIZES, scope="module")
def test_region_function_and_its_backward_equal_the_arithmetic_on_whole_tensors(
    ranks: RankPool, name: str, size: int
) -> None:
    pair = PAIRS[name]

    @given(
        st.lists(st.integers(1, 4), min_size=2, max_size=3),
        st.sampled_from(pair.dims),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        SEEDS,
    )
    def claim(part: list[int], dim: int, dtype: torch.dtype, seed: int) -> None:
        whole = list(part)
        whole[dim] *= size
        shape_in = whole if pair.forward in SHARES_OUT else part
        shape_out = whole if pair.backward in SHARES_OUT else part
        inputs = integers(size, *shape_in, dtype=dtype, seed=seed)
        gradients = integers(size, *shape_out, dtype=dtype, seed=seed + 1)
        results = ranks.run(Layout(tensor=size), apply, name, dim, inputs, gradients)
        for rank, (output, gradient) in enumerate(results):
            expected, expected_gradient = pair.forward(inputs, rank, dim), pair.backward(gradients, rank, dim)
            assert output.dtype == gradient.dtype == dtype
            assert torch.equal(output, expected), f"{name} forward on rank {rank}: {output} is not {expected}"
            assert torch.equal(gradient, expected_gradient), (
                f"{name} backward on rank {rank}: {gradient} is not {expected_gradient}"
            )

    claim()


@pytest.mark.parametrize("name", PAIRS)
def test_region_function_over_one_process_returns_its_input(name: str) -> None:
    x = integers(3, 4, seed=0)
    assert PAIRS[name].function(x, ProcessGroups.single().tensor, 0) is x


def gather_unequal(
    groups: ProcessGroups, sizes: list[int], dim: int, whole: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    own = whole.split(sizes, dim)[groups.tensor.rank].clone().requires_grad_()
    joined = gather_from_region(own, groups.tensor, dim, sizes)
    joined.backward(gradient)
    assert own.grad is not None
    return joined.detach(), own.grad


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_unequal_parts_are_joined_and_their_gradients_taken(ranks: RankPool, size: int) -> None:
    @given(st.lists(st.integers(0, 3), min_size=size, max_size=size), st.sampled_from([0, 1, -1]), SEEDS)
    @settings(max_examples=20)
    def claim(sizes: list[int], dim: int, seed: int) -> None:
        shape = [2, 3, 2]
        shape[dim] = sum(sizes)
        whole, gradient = integers(*shape, seed=seed), integers(*shape, seed=seed + 1)
        for rank, (joined, own) in enumerate(
            ranks.run(Layout(tensor=size), gather_unequal, sizes, dim, whole, gradient)
        ):
            assert torch.equal(joined, whole)
            assert torch.equal(own, gradient.split(sizes, dim)[rank])

    claim()


def refusals(groups: ProcessGroups) -> list[str]:
    found = []
    for refuse in (
        lambda: scatter_to_region(torch.ones(4, 3), groups.tensor),
        lambda: scatter_to_region(torch.ones(3, 4), groups.tensor, dim=0),
        lambda: reduce_scatter_to_sequence_region(torch.ones(3, 4), groups.tensor),
        lambda: gather_from_region(torch.ones(3, 4), groups.tensor, sizes=[3, 3]),
        lambda: gather_from_region(torch.ones(3, 4), groups.tensor, sizes=[4, 4, 4]),
    ):
        with pytest.raises(ArgonneError) as refusal:
            refuse()
        found.append(str(refusal.value))
    return found


def test_a_dimension_that_cannot_be_shared_out_is_refused_in_one_line(ranks: RankPool) -> None:
    for rank, messages in enumerate(ranks.run(Layout(tensor=2), refusals)):
        assert messages == [
            "dimension -1 of [4, 3] cannot be shared out over tensor in equal parts; legal: a multiple of 2",
            "dimension 0 of [3, 4] cannot be shared out over tensor in equal parts; legal: a multiple of 2",
            "dimension 0 of [3, 4] cannot be shared out over tensor in equal parts; legal: a multiple of 2",
            f"sizes=[3, 3] are not those of the parts over tensor: rank {rank} of 2 has 4; legal: the size of every "
            "rank's part",
            f"sizes=[4, 4, 4] are not those of the parts over tensor: rank {rank} of 2 has 4; legal: the size of every "
            "rank's part",
        ]
