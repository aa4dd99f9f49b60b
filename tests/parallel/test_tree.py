"""Sums over an axis in tree order: the same bits as one process that has every rank's tensor."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from argonne.parallel import (
    ArgonneError,
    Axis,
    Layout,
    ProcessGroups,
    copy_to_region,
    data_parallel,
    gather_from_sequence_region,
    record,
    reduce_from_region,
    reduce_scatter_to_sequence_region,
)
from argonne.parallel.communication import tree
from argonne.parallel.communication.reduction import start_sum, start_sum_and_scatter, sum_and_scatter, sum_over
from argonne.parallel.communication.tree import TreeSum, tree_sum
from tests.pool import RankPool

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int32, torch.int64]
SIZES = [1, 2, 3, 4, 5, 6, 7, 8]


def leaf(number: int, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Values of very different magnitude, of either sign: whatever order they are added in shows."""
    generator = torch.Generator().manual_seed(1000 * seed + number)
    if not dtype.is_floating_point:
        return torch.randint(-(2**20), 2**20, tuple(shape), generator=generator).to(dtype)
    exponents = torch.randint(-6, 7, tuple(shape), generator=generator)
    return torch.ldexp(torch.randn(*shape, generator=generator), exponents).to(dtype)


def by_definition(leaves: Sequence[Tensor]) -> Tensor:
    """Pairs of neighbours, then pairs of those; an odd one out is carried up."""
    if len(leaves) == 1:
        return leaves[0]
    pairs = [leaves[i] + leaves[i + 1] if i + 1 < len(leaves) else leaves[i] for i in range(0, len(leaves), 2)]
    return by_definition(pairs)


def assert_bits(found: Tensor, expected: Tensor, what: str) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    one, other = (t.flatten().clone(memory_format=torch.contiguous_format) for t in (found, expected))
    differing = (one.view(torch.uint8) != other.view(torch.uint8)).sum().item()
    assert not differing, f"{what}: {differing} bytes differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", range(1, 41))
def test_a_tree_of_leaves_that_come_one_by_one_is_the_tree_of_all(count: int, dtype: torch.dtype) -> None:
    expected = by_definition([leaf(n, (5,), dtype, 1) for n in range(count)])
    assert_bits(tree_sum([leaf(n, (5,), dtype, 1) for n in range(count)]), expected, "tree_sum")
    counter, alive = TreeSum(), []
    for _ in range(2):  # the next leaf begins another sum
        for n in range(count):
            one = leaf(n, (5,), dtype, 1)
            alive.append(weakref.ref(one))
            counter.add(one)
            del one
            assert sum(known() is not None for known in alive) <= (n + 1).bit_length()
        assert_bits(counter.total(), expected, "TreeSum")


def test_sums_are_made_in_their_left_operands() -> None:
    parts = [torch.ones(3) for _ in range(5)]
    assert tree_sum(parts) is parts[0]
    counter, leaves = TreeSum(), [torch.ones(3) for _ in range(5)]
    for one in leaves:
        counter.add(one)
    assert counter.total() is leaves[0]


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(ArgonneError, match="^a sum of no parts has no shape; legal: 1 part or more$"):
        tree_sum([])
    with pytest.raises(ArgonneError, match=r"^a sum of no leaves has no shape; legal: total\(\) after 1 add\(\)"):
        TreeSum().total()


@pytest.mark.parametrize("count", range(3, 9))
def test_every_swap_of_leaves_of_different_pairs_shows(count: int) -> None:
    leaves = [leaf(n, (64,), torch.float32, 2) for n in range(count)]
    whole = by_definition(leaves)
    for n in range(0, count - 2, 2):  # the second of a pair with the first of the next
        swapped = [*leaves]
        swapped[n + 1], swapped[n + 2] = leaves[n + 2], leaves[n + 1]
        assert not torch.equal(by_definition(swapped), whole)


@dataclass(frozen=True)
class Case:
    """One sum; the rows are shared out over the ranks where it is scattered."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    transposed: bool

    def of_rank(self, rank: int, ranks: int = 1) -> Tensor:
        shape = (ranks * self.shape[0], *self.shape[1:])
        if self.transposed:
            return leaf(rank, shape[::-1], self.dtype, self.seed).permute(*reversed(range(len(shape))))
        return leaf(rank, shape, self.dtype, self.seed)


@st.composite
def cases(draw: st.DrawFn, ranks: int) -> Case:
    """Small ones of any shape, and ones about the size from which the ranks share out the additions."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    if draw(st.booleans()):
        shape = [tree.GATHERED_BYTES // ranks // dtype.itemsize + draw(st.integers(-9, 9))]
    return Case(tuple(shape), dtype, draw(st.integers(0, 1000)), draw(st.booleans()))


def every_sum(groups: ProcessGroups, drawn: Sequence[Case]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Each case summed and scattered at once, and in flight together; waited for in the reverse of their order."""
    axis, ranks = groups.in_blocks(groups.tensor.size).tensor, groups.tensor.size
    found = []
    pending = []
    for case in drawn:
        own, flying = case.of_rank(axis.rank), case.of_rank(axis.rank)
        version = own._version, flying._version
        pending.append((start_sum(flying, axis), start_sum_and_scatter(case.of_rank(axis.rank, ranks), axis)))
        assert sum_over(own, axis) is own
        assert ranks == 2 or (own._version, flying._version) == version
        found.append((own, sum_and_scatter(case.of_rank(axis.rank, ranks), axis), flying))
    late = [(whole.wait(), part.wait()) for whole, part in reversed(pending)]
    for (_, _, flying), (whole, _) in zip(found, reversed(late), strict=True):
        assert whole is flying
    return [(own, part, *later) for (own, part, _), later in zip(found, reversed(late), strict=True)]


@pytest.mark.parametrize("size", SIZES, scope="module")
@settings(max_examples=8)
@given(data=st.data())
def test_sums_over_ranks_are_those_of_one_process_in_every_bit(ranks: RankPool, size: int, data: Any) -> None:
    drawn = data.draw(st.lists(cases(size), min_size=1, max_size=4))
    if size == 2:  # the library sums in place, and takes no other
        drawn = [replace(case, transposed=False) for case in drawn]
    results = ranks.run(Layout(tensor=size), every_sum, drawn)
    for number, case in enumerate(drawn):
        expected = by_definition([case.of_rank(rank) for rank in range(size)])
        parts = by_definition([case.of_rank(rank, size) for rank in range(size)]).chunk(size)
        for rank, found in enumerate(results):
            what = f"{case} on rank {rank} of {size}"
            assert_bits(found[number][0], expected, f"sum of {what}")
            assert_bits(found[number][2], expected, f"sum in flight of {what}")
            assert_bits(found[number][1], parts[rank], f"part of the sum of {what}")
            assert_bits(found[number][3], parts[rank], f"part of the sum in flight of {what}")


LONG = Case((3 * tree.PIECE_BYTES + 20,), torch.float32, 7, False)
"""Several segments of several ranks, the last of them short, and a rest that they cannot share out."""


def long_sums(groups: ProcessGroups) -> tuple[bytes, bytes, list[Any], list[Any]]:
    axis = groups.in_blocks(groups.tensor.size).tensor
    x, flying = LONG.of_rank(axis.rank), LONG.of_rank(axis.rank)
    with record() as at_once:
        sum_over(x, axis)
    with record() as beside:
        pending = start_sum(flying, axis)
        issued = list(beside.collectives)
        pending.wait()
    assert [c for c in issued if c.op == "all_to_all"] == beside.select(op="all_to_all")
    return x.numpy().tobytes(), flying.numpy().tobytes(), at_once.collectives, beside.collectives


@pytest.mark.parametrize("size", [3, 4, 7])
def test_a_long_sum_goes_in_segments_and_moves_as_many_bytes_as_a_ring(ranks: RankPool, size: int) -> None:
    expected = by_definition([LONG.of_rank(rank) for rank in range(size)])
    for x, flying, at_once, beside in ranks.run(Layout(tensor=size), long_sums):
        assert x == expected.numpy().tobytes()
        assert flying == expected.numpy().tobytes()
        for told in (at_once, beside):
            moved = {op: sum(c.bytes for c in told if c.op == op) for op in ("all_to_all", "all_gather")}
            rest = expected.numel() % size * 4
            assert moved["all_to_all"] == expected.nbytes - rest
            assert moved["all_gather"] == expected.nbytes - rest + size * rest
            assert len([c for c in told if c.op == "all_to_all"]) == -(-(expected.nbytes - rest) // size // 2**20)


def along_both_axes(groups: ProcessGroups) -> tuple[Tensor, Tensor]:
    groups = groups.in_blocks(groups.tensor.size)
    x = leaf(groups.world.rank, (40000,), torch.float32, 3)
    return sum_over(x.clone(), groups.tensor), sum_over(x.clone(), groups.data)


def test_sums_of_one_axis_stay_within_it(ranks: RankPool) -> None:
    leaves = [leaf(rank, (40000,), torch.float32, 3) for rank in range(6)]
    for rank, (tensor, data) in enumerate(ranks.run(Layout(data=2, tensor=3), along_both_axes)):
        assert_bits(tensor, by_definition(leaves[rank // 3 * 3 : rank // 3 * 3 + 3]), f"tensor axis of rank {rank}")
        assert_bits(data, by_definition(leaves[rank % 3 :: 3]), f"data axis of rank {rank}")


def replicas(groups: ProcessGroups, kind: str) -> list[tuple[str, Tensor]]:
    """The gradients of a step with three micro-batches, whose sums run beside the last backward."""
    model = nn.Linear(30_000, 7)
    strategy = data_parallel(model, groups.in_blocks(1), kind, bucket_bytes=300_000)
    strategy.begin(1)
    (model.weight * leaf(groups.data.rank, (7, 30_000), torch.float32, 4)).sum().backward()
    strategy.complete()
    return [(sharded.name, sharded.parameter.grad.clone()) for sharded in strategy.parameters]


@pytest.mark.parametrize("kind", ["replicate", "zero1"])
def test_gradients_of_replicas_are_summed_in_their_order(ranks: RankPool, kind: str) -> None:
    expected = by_definition([leaf(rank, (7, 30_000), torch.float32, 4) for rank in range(3)])
    for rank, found in enumerate(ranks.run(Layout(data=3), replicas, kind)):
        rows = slice(None) if kind == "replicate" else slice(3 * rank, 3 * rank + 3)
        assert_bits(dict(found)["weight"], expected[rows], f"gradient on rank {rank}")


def regions(x: Tensor, axis: Axis) -> Tensor:
    """Every region that sums, forward or backward."""
    y = reduce_from_region(copy_to_region(x, axis) * (1 + axis.rank), axis).sin()
    return reduce_scatter_to_sequence_region(gather_from_sequence_region(y, axis) * (1.5 - axis.rank), axis)


def eager_and_compiled(groups: ProcessGroups, rows: int) -> list[Tensor]:
    axis = groups.in_blocks(groups.tensor.size).tensor
    found = []
    for function in (regions, torch.compile(regions, backend="aot_eager", fullgraph=True)):
        x = leaf(axis.rank, (rows, 5), torch.float32, 6).requires_grad_()
        y = function(x, axis)
        (y * leaf(axis.rank, y.shape, torch.float32, 8)).sum().backward()
        assert x.grad is not None
        found += [y.detach(), x.grad]
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("rows", [4, 40_000])
def test_compiled_sums_are_the_eager_ones_in_every_bit(ranks: RankPool, size: int, rows: int) -> None:
    for rank, (y, gradient, *compiled) in enumerate(ranks.run(Layout(tensor=size), eager_and_compiled, rows)):
        assert_bits(compiled[0], y, f"output of rank {rank}")
        assert_bits(compiled[1], gradient, f"gradient of rank {rank}")
