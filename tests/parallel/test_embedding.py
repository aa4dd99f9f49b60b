"""The vocabulary-parallel embedding and head equal their dense forms, with however few tokens on a rank."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import (
    ArgonneError,
    Layout,
    Precision,
    ProcessGroups,
    VocabParallelEmbedding,
    VocabParallelHead,
    VocabularyRange,
    regions_of,
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
    values,
    whole_tokens,
)
from tests.pool import RankPool
from tests.whole import Parts, assemble, parts_of


@given(st.integers(1, 200_000), st.integers(1, 64))
@example(151_665, 8)
@example(5, 4)
def test_ranges_share_out_every_token_once_in_equal_rows(vocabulary: int, ranks: int) -> None:
    parts = [VocabularyRange.of_rank(vocabulary, ranks, rank) for rank in range(ranks)]
    assert parts[0].start == 0
    assert parts[-1].stop == vocabulary
    assert all(one.stop == other.start for one, other in pairwise(parts))
    assert len({part.rows for part in parts}) == 1
    assert parts[0].rows % 8 == 0
    assert all(0 <= part.tokens <= part.rows for part in parts)
    # Padding only on the last ranks that have tokens: the ranks' rows joined begin with the whole vocabulary.
    assert all(part.tokens == part.rows for part in parts if part.stop < vocabulary)
    assert ranks * parts[0].rows - vocabulary < ranks * 8


@given(st.integers(1, 90), st.integers(1, 6), st.integers(0, 2**31))
def test_localise_finds_each_token_on_one_rank_in_its_row(vocabulary: int, ranks: int, seed: int) -> None:
    ids = torch.randint(0, vocabulary, (3, 4), generator=torch.Generator().manual_seed(seed))
    found = torch.zeros_like(ids)
    for rank in range(ranks):
        part = VocabularyRange.of_rank(vocabulary, ranks, rank)
        rows, mine = part.localise(ids)
        assert torch.equal(mine, (ids >= part.start) & (ids < part.stop))
        assert torch.equal(rows[mine] + part.start, ids[mine])
        assert (rows[~mine] == 0).all()
        found += mine
    assert (found == 1).all()


@dataclass(frozen=True)
class Case:
    """A whole weight and its operands, which every process makes again from the seed."""

    vocabulary: int
    hidden: int
    leading: tuple[int, ...]
    sequence: bool
    kind: str
    seed: int = 0

    @property
    def weight(self) -> Tensor:
        return values(self.vocabulary, self.hidden, kind=self.kind, seed=self.seed)

    @property
    def ids(self) -> Tensor:
        return torch.randint(0, self.vocabulary, self.leading, generator=torch.Generator().manual_seed(self.seed))

    @property
    def vectors(self) -> Tensor:
        return values(*self.leading, self.hidden, kind=self.kind, seed=self.seed + 1)

    @property
    def logits(self) -> Tensor:
        return values(*self.leading, self.vocabulary, kind=self.kind, seed=self.seed + 2)


@st.composite
def cases(draw: st.DrawFn, size: int) -> Case:
    sequence = draw(st.booleans())
    leading = draw(leading_dimensions(size, sequence))
    return Case(draw(st.integers(1, 90)), draw(st.integers(1, 5)), leading, sequence, draw(KINDS), draw(SEEDS))


# Ranks without a token, and a rank with a single one; 24 tokens can be shared out at every size.
FEW = [Case(5, 3, (24,), False, "normal"), Case(5, 3, (24,), True, "normal"), Case(33, 3, (24, 2), True, "integers")]


def padding_of(layer: VocabParallelEmbedding | VocabParallelHead) -> list[float]:
    """What is in the padding rows of the weight and of its gradient."""
    assert layer.weight.grad is not None
    return [whole[layer.range.tokens :].abs().sum().item() for whole in (layer.weight.detach(), layer.weight.grad)]


def embed(groups: ProcessGroups, case: Case) -> tuple[Tensor, Parts, Parts, list[float]]:
    """This rank's vectors, its parts of the weight and of its gradient, and its padding."""
    groups = under(groups, case.sequence)
    precision = Precision(case.weight.dtype, case.weight.dtype)
    layer = VocabParallelEmbedding(case.vocabulary, case.hidden, groups, precision=precision)
    fill(layer, groups, {"weight": case.weight})
    vectors = layer(case.ids)
    vectors.backward(own_tokens(case.vectors, groups))
    parts = parts_of(layer, groups, lambda p: p), parts_of(layer, groups, lambda p: p.grad)
    return vectors.detach(), *parts, padding_of(layer)


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_embedding_and_its_gradient_equal_dense_lookup(ranks: RankPool, size: int) -> None:
    @given(cases(size))
    @example(FEW[0])
    @example(FEW[1])
    @example(FEW[2])
    def claim(case: Case) -> None:
        results = ranks.run(Layout(tensor=size), embed, case)
        # A token that occurs twice adds up both gradients.
        gradients = case.vectors.reshape(-1, case.hidden)
        expected = torch.zeros_like(case.weight).index_add_(0, case.ids.reshape(-1), gradients)
        for rank, (*_, padding) in enumerate(results):
            assert padding == [0, 0], f"padding rows and their gradient on rank {rank}"
        vectors = whole_tokens([vectors for vectors, *_ in results], case.sequence)
        assert torch.equal(vectors, case.weight[case.ids])
        assert torch.equal(assemble(weights for _, weights, *_ in results)["weight"], case.weight)
        gradient = assemble(gradients for _, _, gradients, _ in results)["weight"]
        assert_same(gradient, expected, case.kind, "gradient of the weight")

    claim()


def head(groups: ProcessGroups, case: Case) -> tuple[Tensor, Tensor, Parts, list[float], tuple[int, int]]:
    """This rank's logits, input gradient, parts of the weight's gradient, padding and range."""
    groups = under(groups, case.sequence)
    precision = Precision(case.weight.dtype, case.weight.dtype)
    layer = VocabParallelHead(case.vocabulary, case.hidden, groups, precision=precision)
    fill(layer, groups, {"weight": case.weight})
    x = own_tokens(case.vectors, groups).clone().requires_grad_()
    logits = layer(x)
    held = (layer.range.start, layer.range.stop)
    logits.backward(case.logits[..., slice(*held)])
    assert x.grad is not None
    return logits.detach().clone(), x.grad, parts_of(layer, groups, lambda p: p.grad), padding_of(layer), held


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_head_logits_and_gradients_equal_dense(ranks: RankPool, size: int) -> None:
    @given(cases(size))
    @example(FEW[0])
    @example(FEW[1])
    @example(FEW[2])
    def claim(case: Case) -> None:
        results = ranks.run(Layout(tensor=size), head, case)
        logits = torch.cat([local for local, *_ in results], dim=-1)
        assert_same(logits, case.vectors @ case.weight.T, case.kind, "logits of all ranks in their order")
        for rank, (local, _, _, padding, (start, stop)) in enumerate(results):
            assert local.shape[-1] == stop - start, f"rank {rank}"
            assert padding == [0, 0], f"padding rows and their gradient on rank {rank}"
        x_gradient = whole_tokens([x_gradient for _, x_gradient, *_ in results], case.sequence)
        assert_same(x_gradient, case.logits @ case.weight, case.kind, "input gradient")
        expected = case.logits.reshape(-1, case.vocabulary).T @ case.vectors.reshape(-1, case.hidden)
        gradient = assemble(gradients for _, _, gradients, *_ in results)["weight"]
        assert_same(gradient, expected, case.kind, "gradient of the weight")

    claim()


def half(groups: ProcessGroups, weight: Tensor, ids: Tensor) -> Tensor:
    layer = VocabParallelEmbedding(*weight.shape, groups, precision=Precision(torch.float32, torch.bfloat16))
    fill(layer, groups, {"weight": weight})
    return layer(ids).detach()


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_embedding_rounds_each_vector_once_to_the_compute_dtype(ranks: RankPool, size: int) -> None:
    weight = torch.randn(21, 6, generator=torch.Generator().manual_seed(4))
    ids = torch.arange(21).view(3, 7)
    for vectors in ranks.run(Layout(tensor=size), half, weight, ids):
        # A sum with other ranks' zeros rounds nothing further.
        assert torch.equal(vectors, weight.bfloat16()[ids])


def begin(groups: ProcessGroups, kind: type[VocabParallelEmbedding]) -> Parts:
    layer = kind(37, 3, groups)
    for sharded in sharded_parameters(layer, groups):
        for region, part in regions_of([sharded]):
            assert sharded.spec.initialiser is not None
            sharded.spec.initialiser.fill(part, 5, region.name, region.whole_shape, region.start)
    return parts_of(layer, groups, lambda p: p)


@pytest.mark.parametrize("kind", [VocabParallelEmbedding, VocabParallelHead])
def test_initial_weight_is_the_same_whole_tensor_at_every_size(
    ranks: RankPool, kind: type[VocabParallelEmbedding]
) -> None:
    alone, *others = (assemble(ranks.run(Layout(tensor=size), begin, kind))["weight"] for size in [1, 2, 3])
    assert alone.count_nonzero() == alone.numel()
    for other in others:
        assert torch.equal(other, alone)


def embed_or_refuse(groups: ProcessGroups, weight: Tensor, ids: Tensor) -> Tensor | str:
    layer = VocabParallelEmbedding(*weight.shape, groups)
    fill(layer, groups, {"weight": weight})
    try:
        return layer(ids).detach()
    except (ValueError, IndexError):
        return "refused"


@pytest.mark.parametrize("token", [13, -1])
def test_an_id_outside_the_vocabulary_is_treated_alike_at_every_size(ranks: RankPool, token: int) -> None:
    weight = values(13, 4, kind="integers", seed=1)
    found = [ranks.run(Layout(tensor=size), embed_or_refuse, weight, torch.tensor([token]))[0] for size in (1, 2)]
    if "refused" not in found:
        assert torch.equal(found[0], found[1]), f"{found[0].tolist()} alone, {found[1].tolist()} on two ranks"
    else:
        assert found == ["refused", "refused"]


def refusal_of_ids(groups: ProcessGroups) -> str:
    layer = VocabParallelEmbedding(13, 4, under(groups, True))
    with pytest.raises(ArgonneError) as refusal:
        layer(torch.tensor([1, 2, 3]))
    return str(refusal.value)


def test_ids_that_cannot_be_shared_out_are_refused_in_one_line(ranks: RankPool) -> None:
    message = "dimension 0 of [3, 4] cannot be shared out over tensor in equal parts; legal: a multiple of 2"
    assert ranks.run(Layout(tensor=2), refusal_of_ids) == [message] * 2
