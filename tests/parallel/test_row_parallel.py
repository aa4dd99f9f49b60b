"""A row-parallel layer, alone, equals one dense layer: output and every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import (
    ArgonneError,
    Layout,
    LayoutError,
    Partition,
    Precision,
    ProcessGroups,
    RowParallelLinear,
    complete_gradients,
    sharded_parameters,
)
from tests.parallel.operands import (
    KINDS,
    SEEDS,
    SIZES,
    assert_same,
    fill,
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

    part: Partition
    out: int
    leading: tuple[int, ...]
    kind: str = "normal"
    bias: bool = False
    whole_input: bool = False
    sequence: bool = False
    seed: int = 0

    @property
    def x(self) -> Tensor:
        return values(*self.leading, self.part.features, kind=self.kind, seed=self.seed)

    @property
    def wholes(self) -> dict[str, Tensor]:
        found = {"weight": values(self.out, self.part.features, kind=self.kind, seed=self.seed + 1)}
        return found | ({"bias": values(self.out, kind=self.kind, seed=self.seed + 2)} if self.bias else {})

    @property
    def gradient(self) -> Tensor:
        return values(*self.leading, self.out, kind=self.kind, seed=self.seed + 3)


def row(groups: ProcessGroups, case: Case) -> tuple[Tensor, Tensor, Tensor | None, Parts]:
    """One rank's output, input gradient, bias gradient before it is complete, and complete gradients."""
    groups = under(groups, case.sequence)
    x = case.x
    layer = RowParallelLinear(
        case.part.features if case.part.is_even else case.part,
        case.out,
        groups,
        bias=case.bias,
        input_is_parallel=not case.whole_input,
        precision=Precision(x.dtype, x.dtype),
    )
    fill(layer, groups, case.wholes)
    if not case.whole_input:
        x = x[..., columns_of(case.part, groups.tensor.rank)]
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(own_tokens(case.gradient, groups))
    partial = None if layer.bias is None else layer.bias.grad.clone()
    complete_gradients(sharded_parameters(layer, groups), groups)
    assert x.grad is not None
    return y.detach(), x.grad, partial, parts_of(layer, groups, lambda p: p.grad)


def columns_of(part: Partition, rank: int) -> list[int]:
    return [feature for _, whole, _ in part.runs(rank) for feature in whole]


def check(ranks: RankPool, size: int, case: Case) -> None:
    results = ranks.run(Layout(tensor=size), row, case)
    x, leaves = case.x.requires_grad_(), {name: whole.requires_grad_() for name, whole in case.wholes.items()}
    expected = x @ leaves["weight"].T + leaves.get("bias", 0)
    expected.backward(case.gradient)
    output = whole_tokens([y for y, *_ in results], case.sequence)
    assert_same(output, expected.detach(), case.kind, "output")
    for rank, (_, x_gradient, _, _) in enumerate(results):
        own = x.grad if case.whole_input else x.grad[..., columns_of(case.part, rank)]
        assert_same(x_gradient, own, case.kind, f"input gradient on rank {rank}")
    gradients = assemble(parts for *_, parts in results)
    assert set(gradients) == set(leaves)
    for name, whole in leaves.items():
        assert_same(gradients[name], whole.grad, case.kind, f"gradient of {name}")


@st.composite
def cases(draw: st.DrawFn, size: int, part: st.SearchStrategy[Partition], whole_input: bool = False) -> Case:
    sequence = draw(st.booleans())
    return Case(
        draw(part),
        draw(st.integers(1, 9)),
        draw(leading_dimensions(size, sequence)),
        draw(KINDS),
        draw(st.booleans()),
        whole_input,
        sequence,
        draw(SEEDS),
    )


@pytest.mark.parametrize("whole_input", [False, True])
@pytest.mark.parametrize("size", SIZES, scope="module")
def test_output_and_gradients_equal_dense(ranks: RankPool, size: int, whole_input: bool) -> None:
    equal = st.integers(1, 5).map(lambda local: Partition.split("", size * local, size))

    @given(cases(size, equal, whole_input))
    def claim(case: Case) -> None:
        check(ranks, size, case)

    claim()


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_unequal_parts_of_the_input_equal_dense(ranks: RankPool, size: int) -> None:
    @given(cases(size, unshared_part(size)))
    def claim(case: Case) -> None:
        check(ranks, size, case)

    claim()


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("kind", ["normal", "integers"])
def test_ranks_that_hold_nothing_have_the_whole_output(ranks: RankPool, kind: str, sequence: bool) -> None:
    part = Partition.blocks("", 3, 2, 4)  # fewer heads than ranks
    assert [part.local_features(rank) for rank in range(4)] == [0, 3, 0, 3]
    check(ranks, 4, Case(part, 5, (4, 2), kind=kind, bias=True, sequence=sequence))


@pytest.mark.parametrize("size", [2, 4], scope="module")
def test_bias_gradient_is_of_the_ranks_own_tokens_until_it_is_completed(ranks: RankPool, size: int) -> None:
    part = Partition.split("", 3 * size, size)
    for sequence in (False, True):
        case = Case(part, 5, (2 * size, 3), "integers", bias=True, sequence=sequence)
        whole = case.gradient.sum((0, 1))
        for rank, (_, _, partial, parts) in enumerate(ranks.run(Layout(tensor=size), row, case)):
            own = case.gradient[2 * rank : 2 * rank + 2].sum((0, 1)) if sequence else whole
            assert partial is not None
            assert_same(partial, own, "integers", f"bias gradient before it is completed, rank {rank}")
            assert_same(assemble([parts[-1:]])["bias"], whole, "integers", f"bias gradient, rank {rank}")


def refusals(groups: ProcessGroups) -> list[str]:
    shared = Partition("", 1, (range(0, 1), range(0, 1)))
    unequal = Partition.split("", 3, 2, uneven=True)
    odd = RowParallelLinear(4, 3, under(groups, True))
    torch.nn.init.ones_(odd.weight)
    found = []
    for refuse, error in (
        (lambda: RowParallelLinear(9, 4, groups), LayoutError),
        (lambda: RowParallelLinear(shared, 4, groups), LayoutError),
        (lambda: RowParallelLinear(unequal, 4, groups, input_is_parallel=False), LayoutError),
        (lambda: RowParallelLinear(Partition.split("", 3, 3), 4, groups), LayoutError),
        (lambda: odd(torch.ones(5, 2)), ArgonneError),
    ):
        with pytest.raises(error) as refusal:
            refuse()
        found.append(str(refusal.value))
    return found


def test_what_cannot_be_shared_out_is_refused_naming_what_is_legal(ranks: RankPool) -> None:
    for messages in ranks.run(Layout(tensor=2), refusals):
        assert messages == [
            "in_features=9 is not divisible by tensor_parallel=2; legal sizes: 1, 3, 9",
            "in_features of RowParallelLinear are shared, or unequal and whole; legal: equal parts",
            "in_features of RowParallelLinear are shared, or unequal and whole; legal: equal parts",
            "features is a partition for 3 ranks; legal: tensor_parallel=2",
            "dimension 0 of [5, 3] cannot be shared out over tensor in equal parts; legal: a multiple of 2",
        ]
