"""What a collective costs beside a matrix product: the all-reduce that a column-parallel backward hides."""

from __future__ import annotations

from statistics import quantiles
from typing import Any

import torch
import torch.distributed as dist

from argonne.models import ArgonneConfig
from argonne.parallel import ProcessGroups
from benchmarks.collective_timing import Budget, measure


def time_overlap(
    config: ArgonneConfig, tokens: int, dtype: torch.dtype, budget: Budget, groups: ProcessGroups
) -> dict[str, Any]:
    """Time the two alone and together, as a JSON record.

    The collective sums an input gradient ``[tokens, hidden]``. The product is the weight gradient of this rank's
    part of a feed-forward layer: ``[intermediate / ranks, tokens] @ [tokens, hidden]``. Both grow with ``tokens``,
    so that a small number of them leaves the proportion of the two as it is. ``hidden_fraction`` is of the medians;
    its quartiles are over the rounds: far apart, they say that noise is larger than the shorter of the two.
    """
    axis = groups.tensor
    width = local_width(config, axis.size)
    like: dict[str, Any] = {"dtype": dtype, "device": groups.device}
    input_gradient = torch.zeros(tokens, config.hidden_size, **like)  # zeros stay finite, summed without end
    x = torch.randn(tokens, config.hidden_size, **like)
    gradient = torch.randn(tokens, width, **like)
    weight_gradient = torch.empty(width, config.hidden_size, **like)

    def product() -> None:
        torch.mm(gradient.t(), x, out=weight_gradient)

    def collective() -> None:
        dist.all_reduce(input_gradient, group=axis.group)

    def together() -> None:
        work = dist.all_reduce(input_gradient, group=axis.group, async_op=True)
        product()
        work.wait()

    alone, summed, both = measure([product, collective, together], budget, groups)
    rounds = [hidden_fraction(*times) for times in zip(alone.seconds, summed.seconds, both.seconds, strict=True)]
    quarters = quantiles(rounds) if len(rounds) > 1 else rounds
    return {
        "tokens": tokens,
        "hidden": config.hidden_size,
        "width": width,
        "bytes": input_gradient.numel() * input_gradient.element_size(),
        "gflop": 2 * tokens * width * config.hidden_size / 1e9,
        "iterations": len(both.seconds),
        **alone.fields("gemm_"),
        **summed.fields("collective_"),
        **both.fields("both_"),
        "hidden_fraction": hidden_fraction(alone.median, summed.median, both.median),
        "hidden_fraction_quartiles": [quarters[0], quarters[-1]],
    }


def hidden_fraction(gemm: float, collective: float, both: float) -> float:
    """The part of the shorter of the two that cost no time: 1 hides all of it, 0 none; below 0 they disturb."""
    return (gemm + collective - both) / min(gemm, collective)


def local_width(config: ArgonneConfig, ranks: int) -> int:
    """A rank's part of the feed-forward width, the largest where the ranks do not divide it."""
    return -(-config.intermediate_size // ranks)


def overlap_bytes(config: ArgonneConfig, ranks: int, dtype: torch.dtype) -> tuple[int, int]:
    """The memory that ``time_overlap`` needs on each rank: bytes for each token, and bytes whatever the tokens."""
    width = local_width(config, ranks)
    return (2 * config.hidden_size + width) * dtype.itemsize, width * config.hidden_size * dtype.itemsize
