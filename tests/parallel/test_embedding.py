"""The vocabulary-parallel embedding and head equal their dense forms, with however few tokens on a rank."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import (
    Layout,
    Precision,
    ProcessGroups,
    VocabParallelEmbedding,
    VocabParallelHead,
    VocabularyRange,
    regions_of,
    sharded_parameters,
)
from tests.parallel.test_linear import assert_same, fill, values
from tests.pool import RankPool
from tests.whole import Parts, assemble, parts_of

SIZES = [1, 2, 4]  # at module scope: pytest then runs each size in one go, and ranks join a job once
KINDS = st.sampled_from(["normal", "integers"])


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


def embed(
    groups: ProcessGroups, weight: Tensor, ids: Tensor, gradient: Tensor
) -> tuple[Tensor, Parts, Parts, float, float]:
    precision = Precision(weight.dtype, weight.dtype)
    layer = VocabParallelEmbedding(*weight.shape, groups, precision=precision)
    size = groups.tensor.size
    fill(layer, size, {"weight": weight})
    vectors = layer(ids)
    vectors.backward(gradient)
    assert layer.weight.grad is not None
    tokens = layer.range.tokens
    padding = layer.weight.detach()[tokens:].abs().sum().item(), layer.weight.grad[tokens:].abs().sum().item()
    parts = parts_of(layer, groups, lambda p: p), parts_of(layer, groups, lambda p: p.grad)
    return vectors.detach(), *parts, *padding


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_embedding_and_its_gradient_equal_dense_lookup(ranks: RankPool, size: int) -> None:
    @given(st.integers(1, 90), st.integers(1, 5), KINDS, st.integers(0, 2**31))
    @example(5, 3, "normal", 0)  # three ranks of four without a token
    @example(33, 3, "integers", 1)  # one rank of four with a single token
    def claim(vocabulary: int, hidden: int, kind: str, seed: int) -> None:
        weight = values(vocabulary, hidden, kind=kind, seed=seed)
        ids = torch.randint(0, vocabulary, (3, 7), generator=torch.Generator().manual_seed(seed))
        gradient = values(3, 7, hidden, kind=kind, seed=seed + 1)
        results = ranks.run(Layout(tensor=size), embed, weight, ids, gradient)
        # A token that occurs twice adds up both gradients.
        expected = torch.zeros_like(weight).index_add_(0, ids.flatten(), gradient.flatten(0, 1))
        for rank, (vectors, _, _, padding, padding_gradient) in enumerate(results):
            assert torch.equal(vectors, weight[ids]), f"vectors on rank {rank}"
            assert padding == 0, f"padding rows on rank {rank}"
            assert padding_gradient == 0, f"gradient of padding rows on rank {rank}"
        assert torch.equal(assemble(weights for _, weights, *_ in results)["weight"], weight)
        assert_same(assemble(g for _, _, g, *_ in results)["weight"], expected, kind, "gradient of the weight")

    claim()


def head(
    groups: ProcessGroups, weight: Tensor, x: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Parts, float, tuple[int, int]]:
    layer = VocabParallelHead(*weight.shape, groups, precision=Precision(weight.dtype, weight.dtype))
    size = groups.tensor.size
    fill(layer, size, {"weight": weight})
    x = x.clone().requires_grad_()
    logits = layer(x)
    tokens = slice(layer.range.start, layer.range.stop)
    logits.backward(gradient[..., tokens])
    assert x.grad is not None
    assert layer.weight.grad is not None
    padding = layer.weight.grad[layer.range.tokens :].abs().sum().item()
    held = (layer.range.start, layer.range.stop)
    return logits.detach().clone(), x.grad, parts_of(layer, groups, lambda p: p.grad), padding, held


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_head_logits_and_gradients_equal_dense(ranks: RankPool, size: int) -> None:
    @given(st.integers(1, 90), st.integers(1, 5), KINDS, st.integers(0, 2**31))
    @example(5, 3, "normal", 0)
    @example(33, 3, "integers", 1)
    def claim(vocabulary: int, hidden: int, kind: str, seed: int) -> None:
        weight = values(vocabulary, hidden, kind=kind, seed=seed)
        x = values(2, 3, hidden, kind=kind, seed=seed + 1)
        gradient = values(2, 3, vocabulary, kind=kind, seed=seed + 2)
        results = ranks.run(Layout(tensor=size), head, weight, x, gradient)
        logits = torch.cat([local for local, *_ in results], dim=-1)
        assert_same(logits, x @ weight.T, kind, "logits of all ranks in their order")
        for rank, (local, x_gradient, _, padding, (start, stop)) in enumerate(results):
            assert local.shape[-1] == stop - start
            assert_same(x_gradient, gradient @ weight, kind, f"input gradient on rank {rank}")
            assert padding == 0, f"gradient of padding rows on rank {rank}"
        expected = gradient.flatten(0, 1).T @ x.flatten(0, 1)
        assert_same(assemble(g for _, _, g, *_ in results)["weight"], expected, kind, "gradient of the weight")

    claim()


def half(groups: ProcessGroups, weight: Tensor, ids: Tensor) -> Tensor:
    layer = VocabParallelEmbedding(*weight.shape, groups, precision=Precision(torch.float32, torch.bfloat16))
    fill(layer, groups.tensor.size, {"weight": weight})
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
    alone, *others = (assemble(ranks.run(Layout(tensor=size), begin, kind))["weight"] for size in SIZES)
    assert alone.count_nonzero() == alone.numel()
    for other in others:
        assert torch.equal(other, alone)


def embed_or_refuse(groups: ProcessGroups, weight: Tensor, ids: Tensor) -> Tensor | str:
    layer = VocabParallelEmbedding(*weight.shape, groups)
    fill(layer, groups.tensor.size, {"weight": weight})
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
