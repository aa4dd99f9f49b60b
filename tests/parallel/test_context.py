"""Attention over shared sequences equals dense attention, in both directions, with one collective in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import einsum, repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import (
    ArgonneError,
    Axis,
    Collective,
    Layout,
    LayoutError,
    ProcessGroups,
    context_parallel_attention,
    context_positions,
    record,
    shard_sequence,
)
from tests.pool import RankPool
from tests.whole import assert_close

NAMES = ("output", "query gradient", "key gradient", "value gradient")


@dataclass(frozen=True)
class Case:
    """Attention on whole sequences; the ranks make the same operands of it as the parent."""

    batch: int = 2
    kv_heads: int = 2
    group: int = 1
    """Query heads for each key-value head."""
    sequence: int = 16
    dim: int = 4
    documents: str = "none"
    """``none``, ``runs`` (packed documents, cut at random) or ``scattered`` (random numbers)."""
    seed: int = 0

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value and the output's gradient: ``[batch, heads, sequence, dim]``."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = [self.kv_heads * self.group, self.kv_heads, self.kv_heads, self.kv_heads * self.group]
        shapes = [(self.batch, count, self.sequence, self.dim) for count in heads]
        query, key, value, gradient = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        return query, key, value + 0.5, gradient - 0.25

    def document_numbers(self) -> Tensor | None:
        """``[batch, sequence]``"""
        if self.documents == "none":
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        cuts = torch.randint(0, 3, (self.batch, self.sequence), generator=generator)
        return (cuts == 0).int().cumsum(1) if self.documents == "runs" else cuts


def dense(case: Case) -> tuple[Tensor, ...]:
    """``NAMES`` of attention written out: every query, every key, a mask and a softmax."""
    query, key, value, gradient = case.operands()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    keys, values = (repeat(x, "b head s d -> b (head group) s d", group=case.group) for x in (key, value))
    scores = einsum(query, keys, "b head i d, b head j d -> b head i j") / case.dim**0.5
    positions = torch.arange(case.sequence)
    visible = positions[:, None] >= positions[None, :]
    documents = case.document_numbers()
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    output = einsum(weights, values, "b head i j, b head j d -> b head i d")
    return (output.detach(), *torch.autograd.grad(output, leaves, gradient))


def positions_of(sequence: int, size: int, rank: int) -> list[int]:
    """The same positions as ``context_positions``, said in another way."""
    length = sequence // (2 * size)
    return [p for p in range(sequence) if min(p // length, 2 * size - 1 - p // length) == rank]


def attend(groups: ProcessGroups, cases: list[Case]) -> list[tuple[Tensor, ...]]:
    """``NAMES`` of this rank's positions and heads, for each case."""
    return [attend_one(groups, case)[0] for case in cases]


def attend_one(groups: ProcessGroups, case: Case) -> tuple[tuple[Tensor, ...], list[Collective], list[Collective]]:
    """With the collectives of the forward and of the backward."""
    own = context_positions(case.sequence, groups.context)
    parts = [x[:, :, own].chunk(groups.tensor.size, 1)[groups.tensor.rank] for x in case.operands()]
    # In memory as a projection leaves it, token after token.
    query, key, value, gradient = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts)
    kept = [x.clone() for x in (query, key, value, gradient)]
    leaves = [x.requires_grad_() for x in (query, key, value)]
    with record() as forward:
        output = context_parallel_attention(query, key, value, groups.context, case.document_numbers())
    with record() as backward:
        gradients = torch.autograd.grad(output, leaves, gradient)
    for before, after in zip(kept, (query, key, value, gradient), strict=True):
        assert torch.equal(before, after), "an operand was overwritten"
    return (output.detach(), *gradients), forward.collectives, backward.collectives


def assert_dense(layout: Layout, case: Case, found: list[tuple[Tensor, ...]]) -> None:
    """What the ranks found of ``case`` is what dense attention says of their positions and heads."""
    wholes = dense(case)
    for rank, results in enumerate(found):
        place, head = divmod(rank, layout.tensor)
        own = positions_of(case.sequence, layout.context, place)
        for name, result, whole in zip(NAMES, results, wholes, strict=True):
            expected = whole[:, :, own].chunk(layout.tensor, 1)[head]
            # A query that sees one key has no gradient: scale 1 is that of the operands.
            assert_close(result, expected, 1e-10, f"{name} on rank {rank} of {case}", scale=1.0)


def drawn(layout: Layout, count: int) -> list[Case]:
    """Random cases for the layout, to be run in one call of the pool."""
    cases = []

    @settings(max_examples=count, database=None)
    @given(
        st.builds(
            Case,
            batch=st.integers(1, 3),
            kv_heads=st.integers(1, 3).map(lambda n: n * layout.tensor),
            group=st.integers(1, 4),
            sequence=st.integers(1, 5).map(lambda n: n * 2 * layout.context),
            dim=st.integers(1, 9),
            documents=st.sampled_from(["none", "runs", "scattered"]),
            seed=st.integers(0, 2**31),
        )
    )
    def draw(case: Case) -> None:
        cases.append(case)

    draw()
    return cases


@pytest.mark.parametrize("layout", [Layout(context=2), Layout(context=4), Layout(context=2, tensor=2)], ids=str)
def test_output_and_gradients_equal_dense_attention(ranks: RankPool, layout: Layout) -> None:
    chosen = [
        Case(kv_heads=2, group=group, documents=documents, seed=group)
        for group in (1, 3, 4)
        for documents in ("none", "runs", "scattered")
    ]
    cases = chosen + drawn(layout, 40)
    by_rank = ranks.run(layout, attend, cases)
    for i, case in enumerate(cases):
        assert_dense(layout, case, [results[i] for results in by_rank])


@pytest.mark.parametrize("group", [1, 3])
def test_over_one_process_it_is_torchs_own_attention_without_a_collective(group: int) -> None:
    groups = ProcessGroups.single()
    case = Case(group=group, sequence=7)
    results, forward, backward = attend_one(groups, case)
    query, key, value, _ = case.operands()
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=group > 1)
    assert torch.equal(results[0], expected)
    assert forward == backward == []
    for documents in ("none", "runs", "scattered"):
        case = Case(group=group, sequence=7, documents=documents)
        for name, result, whole in zip(NAMES, attend_one(groups, case)[0], dense(case), strict=True):
            assert_close(result, whole, 1e-10, f"{name} of {case}")


def collectives_of(groups: ProcessGroups, case: Case) -> list[list[tuple[Any, ...]]]:
    _, *logs = attend_one(groups, case)
    return [[(c.op, c.axis, c.shape, c.bytes) for c in log] for log in logs]


@pytest.mark.parametrize("layout", [Layout(context=4), Layout(context=2, tensor=2)], ids=str)
@pytest.mark.parametrize("documents", ["none", "runs"])
def test_keys_and_values_are_gathered_once_and_their_gradients_scattered_once(
    ranks: RankPool, layout: Layout, documents: str
) -> None:
    case = Case(batch=3, kv_heads=2, group=3, sequence=24, dim=5, documents=documents)
    local = (2, 3, 2 // layout.tensor, 24 // layout.context, 5)
    whole = (layout.context * local[0], *local[1:])
    size = 8 * 2 * 3 * (2 // layout.tensor) * 24 * 5  # float64; keys and values; batch, heads, sequence, dim
    for found in ranks.run(layout, collectives_of, case):
        assert found == [[("all_gather", "context", local, size)], [("reduce_scatter", "context", whole, size)]]


def poisoned(groups: ProcessGroups, case: Case) -> list[Tensor]:
    """The output when the keys and values from chunk i on are NaN, for each i, and when none are."""
    own = context_positions(case.sequence, groups.context)
    query, key, value, _ = (x[:, :, own] for x in case.operands())
    found = []
    for chunk in range(1, 2 * groups.context.size + 1):
        after = (own >= chunk * case.sequence // (2 * groups.context.size))[:, None]
        keys, values = (x.masked_fill(after, float("nan")) for x in (key, value))
        found.append(context_parallel_attention(query, keys, values, groups.context, case.document_numbers()))
    return found


@pytest.mark.parametrize("documents", ["none", "runs"])
def test_a_chunk_does_not_read_what_comes_after_it(ranks: RankPool, documents: str) -> None:
    """A NaN that is masked makes NaN; one that is left out does not."""
    size = 2
    for rank, found in enumerate(ranks.run(Layout(context=size), poisoned, Case(documents=documents))):
        own = torch.tensor(positions_of(16, size, rank))
        for chunk, output in enumerate(found, start=1):
            before = own < chunk * 16 // (2 * size)
            assert torch.equal(output[:, :, before], found[-1][:, :, before]), f"rank {rank}, NaN from chunk {chunk} on"


@given(st.integers(1, 9), st.integers(1, 5))
def test_positions_are_each_held_once_and_the_causal_work_is_balanced(size: int, length: int) -> None:
    sequence = 2 * size * length
    held = [context_positions(sequence, Axis("context", size, rank)) for rank in range(size)]
    assert torch.cat(held).sort().values.tolist() == list(range(sequence))
    assert {int((positions + 1).sum()) for positions in held} == {sequence * (sequence + 1) // 2 // size}
    for rank, positions in enumerate(held):
        assert positions.dtype == torch.int64
        assert positions.tolist() == positions_of(sequence, size, rank), f"rank {rank} of {size}"


def test_one_process_holds_every_position_whatever_their_number() -> None:
    assert context_positions(7, Axis("context")).tolist() == list(range(7))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_tensor_is_shared_as_the_positions_say(dim: int) -> None:
    x = torch.arange(12 * 12 * 12).view(12, 12, 12)
    for rank in range(3):
        axis = Axis("context", 3, rank)
        assert torch.equal(shard_sequence(x, axis, dim), x.index_select(dim, context_positions(12, axis)))
    assert torch.equal(shard_sequence(x, Axis("context"), dim), x)


def test_a_sequence_that_cannot_be_shared_out_is_refused_in_one_line() -> None:
    axis = Axis("context", 2, 1)
    heads = torch.ones(1, 2, 5, 4)
    for refuse in (
        lambda: context_positions(10, axis),
        lambda: shard_sequence(torch.ones(1, 10), axis),
        lambda: context_parallel_attention(heads, heads, heads, axis),
    ):
        with pytest.raises(LayoutError) as refusal:
            refuse()
        assert str(refusal.value) == (
            "block_size=10 cannot be shared out over context_parallel=2 in equal chunks; "
            "legal: a multiple of 2 x context_parallel = 4"
        )


def test_documents_of_a_share_and_heads_without_a_group_are_refused() -> None:
    axis, heads = Axis("context", 2, 1), torch.ones(1, 3, 4, 4)
    with pytest.raises(ArgonneError, match=r"^documents has shape \[1, 4\]; legal: \[1, 8\], all positions$"):
        context_parallel_attention(heads, heads, heads, axis, torch.ones(1, 4))
    with pytest.raises(ArgonneError, match="^3 query heads cannot share 2 key-value heads; legal: a multiple$"):
        context_parallel_attention(heads, heads[:, :2], heads[:, :2], axis)
