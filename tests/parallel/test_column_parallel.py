"""A column-parallel layer, alone, equals the dense layers whose outputs it shares out: outputs and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import (
    ColumnParallelLinear,
    Layout,
    LayoutError,
    Partition,
    Precision,
    ProcessGroups,
    Region,
    complete_gradients,
    sharded_parameters,
)
from tests.parallel.operands import (
    KINDS,
    SEEDS,
    SIZES,
    assert_same,
    attention_parts,
    fill,
    fused_parts,
    key,
    leading_dimensions,
    own_tokens,
    under,
    unshared_part,
    values,
    whole_tokens,
)
from tests.pool import RankPool
from tests.whole import Parts, assemble, parts_of


@dataclass(frozen=True)
class Case:
    """A layer and its operands, which every process makes again from the seed."""

    parts: tuple[Partition, ...]
    leading: tuple[int, ...]
    width: int = 5
    kind: str = "normal"
    bias: bool = False
    gather: bool = False
    sequence: bool = False
    seed: int = 0

    @property
    def x(self) -> Tensor:
        return values(*self.leading, self.width, kind=self.kind, seed=self.seed + 7)

    @property
    def wholes(self) -> dict[str, Tensor]:
        """The whole weights and biases."""
        found = {}
        for i, part in enumerate(self.parts):
            name = name_of(part)
            found[name] = values(part.features, self.width, kind=self.kind, seed=self.seed + i)
            if self.bias:
                found[bias_of(name)] = values(part.features, kind=self.kind, seed=self.seed + 100 + i)
        return found

    def gradients(self, rank: int) -> dict[str, Tensor]:
        """Of the whole outputs; a rank uses the features that it holds, or all of rank 0's if gathered."""
        rank = 0 if self.gather else rank
        return {
            name_of(part): values(*self.leading, part.features, kind=self.kind, seed=self.seed + 1000 * (rank + 1) + i)
            for i, part in enumerate(self.parts)
        }


def name_of(part: Partition) -> str:
    return f"{part.name}.weight" if part.name else "weight"


def bias_of(name: str) -> str:
    return name.replace("weight", "bias")


def column(groups: ProcessGroups, case: Case) -> tuple[Tensor, list[Region], Tensor, Parts]:
    """Forward and backward on one rank."""
    groups = under(groups, case.sequence)
    x = case.x
    (part, *others) = case.parts
    layer = ColumnParallelLinear(
        case.width,
        part.features if part.is_even and not others and not part.name else case.parts,
        groups,
        bias=case.bias,
        gather_output=case.gather,
        precision=Precision(x.dtype, x.dtype),
    )
    fill(layer, groups, case.wholes)
    local = own_tokens(x, groups).clone().requires_grad_()
    y = layer(local)
    regions = list(layer.shard_specs()["weight"].regions)
    gradients = case.gradients(groups.tensor.rank)
    gradient = gradients["weight"] if case.gather else torch.zeros_like(y)
    if not case.gather:
        for region in regions:
            gradient[..., region.local_index[0]] = gradients[key(region)][..., region.whole_index[0]]
    y.backward(gradient)
    complete_gradients(sharded_parameters(layer, groups), groups)
    assert local.grad is not None
    return y.detach(), regions, local.grad, parts_of(layer, groups, lambda p: p.grad)


def check(ranks: RankPool, size: int, case: Case) -> None:
    """Against each dense layer by itself, given the sum of what the ranks were given for what they hold."""
    results = ranks.run(Layout(tensor=size), column, case)
    x, leaves = case.x.requires_grad_(), {name: whole.requires_grad_() for name, whole in case.wholes.items()}
    given_gradients = [case.gradients(rank) for rank in range(size)]
    outputs = {}
    for part in case.parts:
        name = name_of(part)
        outputs[name] = x @ leaves[name].T + (leaves[bias_of(name)] if case.bias else 0)
        total = torch.zeros_like(outputs[name])
        for rank in range(1 if case.gather else size):
            for block in range(part.features // part.block) if case.gather else part.held[rank]:
                rows = slice(block * part.block, (block + 1) * part.block)
                total[..., rows] += given_gradients[rank][name][..., rows]
        outputs[name].backward(total)
    for rank, (y, regions, _, _) in enumerate(results):
        assert y.shape[:-1] == x.shape[:-1], f"rank {rank} has the output of {list(y.shape[:-1])} tokens"
        for region in regions:
            expected = outputs[key(region)].detach()
            if not case.gather:
                expected = expected[..., region.whole_index[0]]
            found = y if case.gather else y[..., region.local_index[0]]
            assert_same(found, expected, case.kind, f"output {key(region)} on rank {rank}")
    x_gradient = whole_tokens([gradient for _, _, gradient, _ in results], case.sequence)
    assert_same(x_gradient, x.grad, case.kind, "input gradient")
    found_gradients = assemble(parts for *_, parts in results)
    assert set(found_gradients) == set(leaves)
    for name, gradient in found_gradients.items():
        assert_same(gradient, leaves[name].grad, case.kind, f"gradient of {name}")


@st.composite
def cases(draw: st.DrawFn, size: int, parts: st.SearchStrategy[tuple[Partition, ...]], gather: bool = False) -> Case:
    sequence = draw(st.booleans())
    return Case(
        draw(parts),
        draw(leading_dimensions(size, sequence)),
        draw(st.integers(1, 9)),
        draw(KINDS),
        draw(st.booleans()),
        gather,
        sequence,
        draw(SEEDS),
    )


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("size", SIZES, scope="module")
def test_output_and_gradients_equal_dense(ranks: RankPool, size: int, gather: bool) -> None:
    equal = st.integers(1, 5).map(lambda local: (Partition.split("", size * local, size),))

    @given(cases(size, equal, gather))
    def claim(case: Case) -> None:
        check(ranks, size, case)

    claim()


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_fused_shared_and_unequal_parts_equal_separate_dense_layers(ranks: RankPool, size: int) -> None:
    @given(cases(size, fused_parts(size)))
    @settings(max_examples=30)
    def claim(case: Case) -> None:
        check(ranks, size, case)

    claim()


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_one_part_of_unequal_shares_equals_dense(ranks: RankPool, size: int) -> None:
    @given(cases(size, unshared_part(size).map(lambda part: (part,))))
    def claim(case: Case) -> None:
        check(ranks, size, case)

    claim()


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_the_gathered_output_of_one_unequal_part_equals_dense(ranks: RankPool, size: int) -> None:
    @given(cases(size, unshared_part(size).map(lambda part: (part,)), gather=True))
    @settings(max_examples=50)
    def claim(case: Case) -> None:
        check(ranks, size, case)

    claim()


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("kind", ["normal", "integers"])
def test_ranks_that_hold_nothing_take_part_in_the_input_gradient(ranks: RankPool, kind: str, sequence: bool) -> None:
    part = Partition.blocks("", 3, 2, 4)  # fewer heads than ranks
    assert [part.local_features(rank) for rank in range(4)] == [0, 3, 0, 3]
    for gather in (False, True):
        check(ranks, 4, Case((part,), (4, 2), kind=kind, bias=True, gather=gather, sequence=sequence))


# Query heads and key-value heads; the last of each size cannot share out the former equally.
GROUPINGS = {
    2: [(4, 1), (6, 3), (5, 1)],
    3: [(3, 1), (6, 2), (4, 2)],
    4: [(4, 1), (4, 2), (8, 2), (12, 3), (12, 6), (6, 1), (10, 2), (6, 3)],
    8: [(8, 1), (16, 4), (24, 3), (12, 2)],
}


@pytest.mark.parametrize("kind", ["normal", "integers"])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    ("size", "heads", "key_value_heads"),
    [
        pytest.param(size, *counts, marks=[pytest.mark.slow] if size == 8 else [])
        for size, groupings in GROUPINGS.items()
        for counts in groupings
    ],
)
def test_shared_blocks_equal_dense_and_their_gradients_are_summed_over_the_holders(
    ranks: RankPool, size: int, heads: int, key_value_heads: int, kind: str, sequence: bool
) -> None:
    parts = tuple(attention_parts(heads, key_value_heads, 3, size))
    assert parts[1].is_shared
    assert not parts[0].is_shared
    check(ranks, size, Case(parts, (size, 3), 6, kind, True, False, sequence, seed=heads))


def refusals(groups: ProcessGroups) -> list[str]:
    shared = Partition("", 1, (range(0, 1), range(0, 1)))
    crossed = Partition("", 1, (range(1, 2), range(0, 1)))
    of_three = Partition.split("k_proj", 3, 3)
    fused = [Partition.split("a", 2, 2), Partition.split("b", 2, 2)]
    found = []
    for make in (
        lambda: ColumnParallelLinear(4, 9, groups),
        lambda: Partition.split("gate_proj", 9, 2),
        lambda: ColumnParallelLinear(4, [shared], groups, gather_output=True),
        lambda: ColumnParallelLinear(4, [crossed], groups, gather_output=True),
        lambda: ColumnParallelLinear(4, fused, groups, gather_output=True),
        lambda: ColumnParallelLinear(4, [of_three], groups),
    ):
        with pytest.raises(LayoutError) as refusal:
            make()
        found.append(str(refusal.value))
    return found


def test_what_cannot_be_shared_out_is_refused_naming_the_legal_sizes(ranks: RankPool) -> None:
    for messages in ranks.run(Layout(tensor=2), refusals):
        assert messages == [
            "out_features=9 is not divisible by tensor_parallel=2; legal sizes: 1, 3, 9",
            "out_features of gate_proj=9 is not divisible by tensor_parallel=2; legal sizes: 1, 3, 9",
            *[
                "gather_output=True is not defined for fused or shared parts, or parts that are not in the order of "
                "the ranks; legal: False"
            ]
            * 3,
            "k_proj is a partition for 3 ranks; legal: tensor_parallel=2",
        ]
