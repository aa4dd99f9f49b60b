"""The short way of one position through a block has the values of the long one, and is the one that is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from argonne.kernels import apply_rope, rms_norm, swiglu
from argonne.models import ArgonneConfig, ArgonneModel, Execution, KeyValueCache
from argonne.models.rows import gated, normed, turned, whole_tables
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_lies_between_products_is_what_the_kernels_compute(dtype: torch.dtype) -> None:
    x, weight = drawn(3, 40, dtype=dtype, seed=1), drawn(40, dtype=dtype, seed=2)
    tables = torch.promote_types(dtype, torch.float32)
    cos, sin = drawn(3, 4, dtype=tables, seed=3), drawn(3, 4, dtype=tables, seed=4)
    pairs = [
        (normed(x, weight, 1e-5), rms_norm(x, weight, 1e-5)),
        (gated(x), swiglu(x)),
        (turned(x.view(3, 5, 8), *whole_tables(cos, sin)), apply_rope(x.view(1, 3, 5, 8), cos, sin)[0]),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def logits(groups: ProcessGroups, name: str, short: bool) -> Any:
    """Behind two rows of unequal length, at their first pass and at two later ones, of this rank's tokens."""
    model = ArgonneModel(CONFIGS[name], Execution(groups, Precision(torch.float64, torch.float64)))
    model.initialise(seed=2)
    for parameter in model.parameters():
        parameter.data.add_(0.1)  # biases begin as zeros, norms as ones
    assert model.rotary.is_short
    model.rotary.is_short = short
    cache = KeyValueCache(model.cache_shape(), 2, 9)
    passes = [
        (torch.tensor([[3, 1, 4, 1], [5, 9, 0, 0]]), [4, 2]),
        *[(torch.tensor([[n], [n + 1]]), [1, 1]) for n in (2, 7)],
    ]
    found = [model.next_token_scores(ids, counts, cache) for ids, counts in passes]
    return [scores.values[:, : scores.tokens] for scores in found if scores is not None]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_short_way_has_the_logits_of_the_long_one(ranks: RankPool, name: str) -> None:
    expected = logits(ProcessGroups.single(), name, short=False)
    assert len(expected) == 3
    for number, (found, wanted) in enumerate(
        zip(logits(ProcessGroups.single(), name, short=True), expected, strict=True)
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11, msg=f"pass {number}")
    both = ranks.run(Layout(tensor=2), logits, name, True)
    for number, wanted in enumerate(expected):
        whole = torch.cat([found[number] for found in both], -1)
        torch.testing.assert_close(whole, wanted, rtol=1e-11, atol=1e-11, msg=f"pass {number} at TP 2")


@pytest.mark.parametrize("layout", [Layout(tensor=2, sequence_parallel=True)], ids=str)
def test_ranks_that_share_out_rows_take_the_long_way(layout: Layout) -> None:
    model = ArgonneModel(CONFIG, Execution(ProcessGroups.of_rank(layout, 0, "cpu"), Precision()))
    assert model.rotary.inputs_at(torch.tensor([3])).turn is None
