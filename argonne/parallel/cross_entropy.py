"""Cross-entropy over logits whose vocabulary is shared out over the tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from argonne.parallel.collectives import all_gather
from argonne.parallel.embedding import VocabularyRange
from argonne.parallel.groups import Axis

IGNORE_INDEX = -100
"""The target of a position that has no loss (the value that PyTorch uses)."""

# Logits taken at a time, so that scratch in float32 stays in a CPU's cache and small beside the logits.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 27}


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocabulary: VocabularyRange, axis: Axis) -> Tensor:
        rows, mine = vocabulary.localise(targets)
        accurate = torch.promote_types(logits.dtype, torch.float32)
        # Each rank's maximum, sum of exponentials above it, and logit of the target: one message.
        statistics = torch.zeros(3, len(targets), dtype=accurate, device=logits.device)
        statistics[0] = statistics[2] = -torch.inf
        if vocabulary.tokens:
            for chunk in _chunks(logits):
                values = logits[chunk].to(accurate)
                picked = values.gather(1, rows[chunk, None])[:, 0]
                highest = values.amax(1)
                statistics[0, chunk] = highest
                statistics[1, chunk] = (values - highest[:, None]).exp_().sum(1)
                statistics[2, chunk] = torch.where(mine[chunk], picked, -torch.inf)
        highest, total, target_logit = all_gather(statistics, axis).unbind(1)
        top = highest.amax(0)
        log_sum = top + ((highest - top).exp() * total).sum(0).log()
        counted = targets != IGNORE_INDEX
        ctx.save_for_backward(logits, log_sum, rows, mine, counted)
        return torch.where(counted, log_sum - target_logit.amax(0), 0.0)  # of a target that is no token: infinite

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, log_sum, rows, mine, counted = ctx.saved_tensors
        scale = torch.where(counted, gradient, 0.0)
        logits_gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        if logits.shape[1]:
            for chunk in _chunks(logits):
                part = (logits[chunk].to(log_sum.dtype) - log_sum[chunk, None]).exp_()
                part.scatter_add_(1, rows[chunk, None], -mine[chunk, None].to(part.dtype))
                logits_gradient[chunk] = part.mul_(scale[chunk, None])
        return logits_gradient, None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, vocabulary: VocabularyRange, axis: Axis) -> Tensor:
    """The loss of each position, from this rank's part of the logits; the logits are left as they are.

    Args:
        logits: ``[..., vocabulary.tokens]``, this rank's part.
        targets: ``[...]`` token ids of the whole vocabulary, or ``IGNORE_INDEX`` where there is no loss.
        vocabulary: this rank's range.
        axis: the ranks that share the vocabulary.

    Returns:
        ``[...]`` in float32 (float64 for float64 logits), in nats, the same on every rank.
    """
    flat = logits.flatten(0, -2)  # reshape(-1, ...) is undefined for a rank without tokens
    loss = _VocabParallelCrossEntropy.apply(flat, targets.reshape(-1), vocabulary, axis)
    return loss.view(targets.shape)


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK.get(logits.device.type, 1 << 27) // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)
