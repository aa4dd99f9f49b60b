"""Products in canonical blocks: each rank's are, bit for bit, its part of one process's, and close to exact ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import Layout, LayoutError, Partition, ProcessGroups
from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.tree import tree_sum
from argonne.parallel.tensor_parallel import blocks as module
from argonne.parallel.tensor_parallel.blocks import WHOLE, Block, Cut, cut_parts

BLOCKS = 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def axis_of(ranks: int, rank: int, blocks: int = BLOCKS) -> Axis:
    return ProcessGroups.of_rank(Layout(tensor=ranks), rank, "cpu").in_blocks(blocks).tensor


def parts_of(sizes: Sequence[int], ranks: int) -> list[Partition]:
    """Fused features, so many in a block of each."""
    return [Partition.split(f"part{i}", size * BLOCKS, ranks) for i, size in enumerate(sizes)]


@dataclass(frozen=True)
class Case:
    """A product whose one side is cut: its sizes, from which every operand follows."""

    sizes: tuple[int, ...]
    """Features in a block of each fused part."""
    other: int
    """Those of the side that is not cut."""
    rows: int
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def draw(self, *shape: int, number: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + number)).to(self.dtype)

    def blocks(self, ranks: int, rank: int) -> tuple[Block, ...]:
        return cut_parts(parts_of(self.sizes, ranks), axis_of(ranks, rank))

    def features(self, ranks: int, rank: int) -> list[int]:
        """Those of the whole that a rank has, in its order."""
        whole, own = self.blocks(1, 0), BLOCKS // ranks
        held = whole[rank * own : (rank + 1) * own]
        return [feature for part in range(len(self.sizes)) for block in held for feature in block[part]]


cases = st.builds(
    Case,
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)


def by_outputs(case: Case, ranks: int, rank: int) -> list[Tensor]:
    """What a rank makes whose rows of the weight are cut: output, gradient of weight and of bias, and of the input."""
    own, total = case.features(ranks, rank), sum(case.sizes) * BLOCKS
    cut = Cut(outputs=case.blocks(ranks, rank))
    x, weight = case.draw(case.rows, case.other, number=1), case.draw(total, case.other, number=2)[own]
    bias, gradient = case.draw(total, number=3)[own], case.draw(case.rows, total, number=4)[:, own]
    return [
        cut.forward(x, weight, bias).t(),
        cut.weight_gradient(gradient, x),
        cut.bias_gradient(gradient),
        cut.input_gradient(gradient, weight),
    ]


def by_inputs(case: Case, ranks: int, rank: int) -> list[Tensor]:
    """What a rank makes whose columns of the weight are cut: gradients of input and weight, and the partial output."""
    own, total = case.features(ranks, rank), sum(case.sizes) * BLOCKS
    cut = Cut(inputs=case.blocks(ranks, rank))
    x, weight = case.draw(case.rows, total, number=1)[:, own], case.draw(case.other, total, number=2)[:, own]
    gradient = case.draw(case.rows, case.other, number=4)
    return [
        cut.input_gradient(gradient, weight.contiguous()).t(),
        cut.weight_gradient(gradient, x.contiguous()).t(),
        cut.forward(x.contiguous(), weight.contiguous(), None),
    ]


def exact(case: Case, outputs: bool) -> list[Tensor]:
    total = sum(case.sizes) * BLOCKS
    if outputs:
        x, weight = case.draw(case.rows, case.other, number=1), case.draw(total, case.other, number=2)
        bias, gradient = case.draw(total, number=3), case.draw(case.rows, total, number=4)
        x, weight, bias, gradient = x.double(), weight.double(), bias.double(), gradient.double()
        return [(x @ weight.t() + bias).t(), gradient.t() @ x, gradient.sum(0), gradient @ weight]
    x, weight = case.draw(case.rows, total, number=1).double(), case.draw(case.other, total, number=2).double()
    gradient = case.draw(case.rows, case.other, number=4).double()
    return [(gradient @ weight).t(), (gradient.t() @ x).t(), x @ weight.t()]


@pytest.mark.parametrize(("made", "outputs"), [(by_outputs, True), (by_inputs, False)], ids=["outputs", "inputs"])
def test_each_rank_has_its_part_of_the_bits_of_one(
    made: Callable[[Case, int, int], list[Tensor]], outputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not the products of some shape may be made at once."""

    @given(cases)
    @example(Case((8, 4, 4), 64, 32))
    @example(Case((16,), 64, 32, torch.bfloat16))
    def claim(case: Case) -> None:
        whole = made(case, 1, 0)
        for found, expected in zip(whole, exact(case, outputs), strict=True):
            assert found.shape == expected.shape
            scale = 1 + expected.abs().max()
            assert (found.double() - expected).abs().max() <= TOLERANCE[case.dtype] * scale
        for ranks in (2, 4):
            each = [made(case, ranks, rank) for rank in range(ranks)]
            for rank, (*parts, _) in enumerate(each):
                for part, all_of_it in zip(parts, whole, strict=False):
                    assert torch.equal(part, all_of_it[case.features(ranks, rank)]), f"rank {rank} of {ranks}"
            assert torch.equal(tree_sum([partial for *_, partial in each]), whole[-1]), f"sum of {ranks}"
        with pytest.MonkeyPatch.context() as patch:
            for probe in ("_columns_are_alike", "_rows_are_alike"):
                patch.setattr(module, probe, lambda *kinds: False)
            assert all(torch.equal(one, other) for one, other in zip(made(case, 1, 0), whole, strict=True))

    claim()


def test_fused_parts_are_cut_each_in_their_blocks() -> None:
    """A rank's queries, keys and values of one block belong together."""
    assert cut_parts(parts_of((3, 2), 1), axis_of(1, 0)) == (
        (range(0, 3), range(12, 14)),
        (range(3, 6), range(14, 16)),
        (range(6, 9), range(16, 18)),
        (range(9, 12), range(18, 20)),
    )
    assert cut_parts(parts_of((3, 2), 2), axis_of(2, 1)) == ((range(0, 3), range(6, 8)), (range(3, 6), range(8, 10)))
    assert cut_parts(parts_of((3,), 2), Axis("tensor", 2)) == ()


@pytest.mark.parametrize(
    "part",
    [
        Partition.split("q_proj", 10, 2),
        Partition("k_proj", 4, (range(0, 1), range(0, 1))),
        Partition("v_proj", 4, (range(1, 2), range(0, 1))),
        Partition.blocks("o_proj", 4, 3, 2),
    ],
    ids=["not divisible", "shared", "in another order", "unequal"],
)
def test_parts_that_are_not_equal_blocks_in_order_are_refused(part: Partition) -> None:
    with pytest.raises(LayoutError, match=f"{part.name} of {part.features} over 2 ranks is not shared out in 4 equal"):
        cut_parts([part], axis_of(2, 0))


def test_what_is_not_cut_is_the_library_s_product() -> None:
    x, weight, bias = torch.randn(9, 33), torch.randn(21, 33), torch.randn(21)
    gradient = torch.randn(9, 21)
    assert not WHOLE
    assert torch.equal(WHOLE.forward(x, weight, bias), module.product(x, weight, bias))
    assert torch.equal(WHOLE.input_gradient(gradient, weight), module.product(gradient, weight.t()))
    assert torch.equal(WHOLE.weight_gradient(gradient, x), module.product(gradient.t(), x.t()))
    assert torch.equal(WHOLE.bias_gradient(gradient), gradient.sum(0))
    half = [t.bfloat16() for t in (x, weight, bias)]
    assert torch.equal(WHOLE.forward(*half), F.linear(*half))


def test_a_shape_is_tried_once_and_no_random_number_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = module._drawn
    monkeypatch.setattr(module, "_drawn", lambda kind, seed: drawn.append(seed) or real(kind, seed))
    before = torch.get_rng_state()
    case = Case((5,), 37, 11)  # of no other test
    cut = Cut(outputs=case.blocks(1, 0))
    x, weight = case.draw(11, 37, number=1), case.draw(20, 37, number=2)
    for _ in range(3):
        cut.forward(x, weight, None)
    assert drawn == list(range(1, 1 + 2 * (4096 // 220)))
    assert torch.equal(torch.get_rng_state(), before)
