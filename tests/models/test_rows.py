"""The short way of one position through a block has the values of the long one, and is the one that is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from argonne.kernels import apply_rope, rms_norm, swiglu
from argonne.models import ArgonneConfig, ArgonneModel, Execution, KeyValueCache
from argonne.models.rows import attended, gated, normed, turned, whole_tables
from argonne.parallel import Layout, Precision, ProcessGroups
from tests.pool import RankPool

CONFIG = ArgonneConfig(24, 2, 6, 3, 29, 12, 4, max_position_embeddings=18, initializer_range=0.5)
CONFIGS = {
    "llama": CONFIG,
    "qwen2": replace(CONFIG, family="qwen2", attention_bias=True),
    "qwen3": replace(CONFIG, family="qwen3", qk_norm=True),
}


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_lies_between_products_is_what_the_kernels_compute(dtype: torch.dtype) -> None:
    x, weight = drawn(3, 40, dtype=dtype, seed=1), drawn(40, dtype=dtype, seed=2)
    cos, sin = drawn(3, 4, dtype=dtype, seed=3), drawn(3, 4, dtype=dtype, seed=4)
    keys, values = drawn(2, 2, 7, 8, dtype=dtype, seed=5)
    heads, used = x.view(3, 5, 8), [0, 0, 0, 1, 1]
    seen = F.scaled_dot_product_attention(heads[0].unsqueeze(1), keys[used], values[used])
    rows, turns = x.numpy(), whole_tables(cos.numpy(), sin.numpy())
    pairs = [
        (normed(rows, weight.numpy(), 1e-5), rms_norm(x, weight, 1e-5)),
        (gated(rows), swiglu(x)),
        (turned(heads.numpy(), *turns), apply_rope(heads.unsqueeze(0), cos, sin)[0]),
        (attended(heads[0].numpy(), keys.numpy(), values.numpy(), [slice(3), slice(3, 5)]), seen.squeeze(1)),
    ]
    for found, expected in pairs:
        assert found.dtype == rows.dtype
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=tolerance, atol=tolerance)


def logits(groups: ProcessGroups, name: str, short: bool) -> Any:
    """Behind two rows of unequal length, at their first pass and at two later ones, the last of one row alone."""
    model = ArgonneModel(CONFIGS[name], Execution(groups, Precision(torch.float64, torch.float64)))
    model.initialise(seed=2)
    for parameter in model.parameters():
        parameter.data.add_(0.1)  # biases begin as zeros, norms as ones
    for block in model.blocks:
        assert block.is_short
        block.is_short = short
    cache, found = KeyValueCache(model.cache_shape(), 2, 9), []
    for ids in ([[3, 1, 4, 1], [5, 9, 0, 0]], [[2], [3]], [[7], [8]], [[6]]):
        counts = [4, 2] if len(ids[0]) > 1 else [1] * len(ids)
        cache.keep(range(len(ids)))
        found.append(model.next_token_scores(torch.tensor(ids), counts, cache))
    return [scores.values[:, : scores.tokens] for scores in found if scores is not None]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_short_way_has_the_logits_of_the_long_one(ranks: RankPool, name: str) -> None:
    expected = logits(ProcessGroups.single(), name, short=False)
    assert len(expected) == 4
    for number, (found, wanted) in enumerate(
        zip(logits(ProcessGroups.single(), name, short=True), expected, strict=True)
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11, msg=f"pass {number}")
    both = ranks.run(Layout(tensor=2), logits, name, True)
    for number, wanted in enumerate(expected):
        whole = torch.cat([found[number] for found in both], -1)
        torch.testing.assert_close(whole, wanted, rtol=1e-11, atol=1e-11, msg=f"pass {number} at TP 2")


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        (Layout(tensor=2, sequence_parallel=True), Precision()),
        (Layout(), Precision(torch.bfloat16, torch.bfloat16)),
        (Layout(), Precision(torch.bfloat16, torch.float32)),
    ],
)
def test_ranks_that_share_out_rows_and_what_numpy_cannot_compute_take_the_long_way(
    layout: Layout, precision: Precision
) -> None:
    model = ArgonneModel(CONFIG, Execution(ProcessGroups.of_rank(layout, 0, "cpu"), precision))
    assert model.blocks[0].of_rows(*KeyValueCache(model.cache_shape(), 1, 1).layer(0)) is None
