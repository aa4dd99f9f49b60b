"""Cross-entropy of one rank's part of the logits: statistics in one read, and the gradient from them in one more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from argonne.kernels.gpu.launch import as_rows, cdiv, power_of_2, warps
from argonne.parallel.tensor_parallel.cross_entropy import SavedLogits, ShardedSoftmax

STATISTICS_BLOCK, GRADIENT_BLOCK = 8192, 2048
"""Columns at a time."""
LOSSES_BLOCK = 512
"""Positions at a time."""
FEW_WARPS = 4
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _add(values, top, exponentials):
    """A block's values added to the sum of exponentials above ``top``, which may rise."""
    higher = tl.maximum(top, tl.max(values, 0))
    return higher, exponentials * tl.exp(top - higher) + tl.exp(values - higher)


@triton.jit
def _own_column(target, first, columns):
    """Where a target is among this rank's columns, which begin at token ``first``; -1 where another rank has it."""
    own = target - first
    return tl.where((own >= 0) & (own < columns), own, -1)


@triton.jit
def statistics_kernel(
    logits, targets, statistics, stride, tokens, first, columns, WANTS_SUM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row's maximum, the sum of exponentials above it, the target's logit and (if wanted) the sum, in one read.

    Whole blocks are loaded without a mask: at a vocabulary of 151,665 one would forbid wide loads.
    """
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * stride
    offset = tl.arange(0, BLOCK)
    # A row may be -inf throughout: exp(-inf - lowest) is 0 where exp(-inf + inf) would be nan.
    top = tl.full([], LOWEST, tl.float32)
    exponentials = tl.zeros([BLOCK], tl.float32)
    total = tl.full([], 0.0, tl.float32)
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        values = tl.load(start_of_row + start + offset).to(tl.float32)
        top, exponentials = _add(values, top, exponentials)
        if WANTS_SUM:
            total += tl.sum(values, 0)
    if whole < columns:
        mask = whole + offset < columns
        values = tl.load(start_of_row + whole + offset, mask, other=-float("inf")).to(tl.float32)
        top, exponentials = _add(values, top, exponentials)
        if WANTS_SUM:
            total += tl.sum(tl.where(mask, values, 0.0), 0)
    tl.store(statistics + row, top)
    tl.store(statistics + tokens + row, tl.sum(exponentials, 0))
    own = _own_column(tl.load(targets + row), first, columns)
    tl.store(statistics + 2 * tokens + row, tl.load(start_of_row + own, own >= 0, other=-float("inf")).to(tl.float32))
    if WANTS_SUM:
        tl.store(statistics + 3 * tokens + row, total)


@triton.jit
def losses_kernel(
    statistics, targets, losses, sums, ranks, tokens, ignored,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of each position, and the softmax's ``sums``, from every rank's statistics of it."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = token < tokens
    top = tl.full([BLOCK], LOWEST, tl.float32)
    own = tl.full([BLOCK], -float("inf"), tl.float32)
    exponentials = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    one = statistics + token
    for _ in range(0, ranks):
        highest = tl.load(one, mask, other=LOWEST)
        higher = tl.maximum(top, highest)
        above = tl.load(one + tokens, mask, other=0.0)
        exponentials = exponentials * tl.exp(top - higher) + above * tl.exp(highest - higher)
        top = higher
        own = tl.maximum(own, tl.load(one + 2 * tokens, mask, other=0.0))
        if SMOOTHING > 0:
            total += tl.load(one + 3 * tokens, mask, other=0.0)
        one += (4 if SMOOTHING > 0 else 3) * tokens
    log_total = tl.log(exponentials)
    loss = (top - own) + log_total  # a difference of logits first: it does not suffer when all of them are large
    if SMOOTHING > 0:
        loss = (1 - SMOOTHING) * loss + SMOOTHING * ((top - total / VOCABULARY) + log_total)
    if Z_LOSS > 0:
        loss += Z_LOSS * (top + log_total) * (top + log_total)
    loss = tl.where(tl.load(targets + token, mask, other=0) == ignored, 0.0, loss)
    tl.store(losses + token, loss, mask)
    tl.store(sums + token, top, mask)
    tl.store(sums + tokens + token, log_total, mask)


@triton.jit
def _gradient(values, column, top, log_total, factor, even, at_target, own):
    """Of a block of logits; ``own`` is the target's column, or -1."""
    gradient = tl.exp(values.to(tl.float32) - top - log_total) * factor - even
    return tl.where(column == own, gradient - at_target, gradient)


@triton.jit
def gradient_kernel(
    logits, out, sums, targets, scale, stride, out_stride, sums_stride, scale_stride, first, columns, ignored,
    EVEN: tl.constexpr, AT_TARGET: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``factor * softmax - EVEN * scale``, and ``- AT_TARGET * scale`` in the target's column; ``out`` may be logits.

    EVEN is label smoothing over the vocabulary's size, AT_TARGET is 1 - label smoothing; ``scale``, the gradient of
    the losses, is 1 if it is not given, and 0 of an ignored target.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    top, log_total, target = tl.load(sums + row), tl.load(sums + sums_stride + row), tl.load(targets + row)
    given = tl.full([], 1.0, tl.float32) if scale is None else tl.load(scale + row * scale_stride).to(tl.float32)
    given = tl.where(target == ignored, 0.0, given)
    factor = given * (1 + 2 * Z_LOSS * (top + log_total)) if Z_LOSS > 0 else given
    even, at_target = EVEN * given, AT_TARGET * given
    own = _own_column(target, first, columns)
    source, sink = logits + row * stride + column, out + row * out_stride + column
    if start + BLOCK <= columns:
        gradient = _gradient(tl.load(source), column, top, log_total, factor, even, at_target, own)
        tl.store(sink, gradient.to(out.dtype.element_ty))
    else:
        mask = column < columns
        values = tl.load(source, mask, other=0.0)
        gradient = _gradient(values, column, top, log_total, factor, even, at_target, own)
        tl.store(sink, gradient.to(out.dtype.element_ty), mask)


@dataclass
class TritonSoftmax(ShardedSoftmax):
    """``ShardedSoftmax`` by these kernels; nothing as wide as the vocabulary is allocated in float32."""

    def __post_init__(self) -> None:
        self.ids = self.ids.contiguous()  # the kernels take one after the other

    def statistics(self, logits: Tensor) -> tuple[Tensor, SavedLogits]:
        """As ``ShardedSoftmax.statistics``; what is saved are the logits themselves."""
        logits = as_rows(logits)
        tokens, columns = logits.shape
        wants_sum = self.objective.label_smoothing > 0
        block = min(STATISTICS_BLOCK, power_of_2(columns))
        statistics = torch.empty(4 if wants_sum else 3, tokens, dtype=torch.float32, device=logits.device)
        if tokens:
            statistics_kernel[(tokens,)](
                logits, self.ids, statistics, logits.stride(0), tokens, self.vocabulary.start, columns,
                WANTS_SUM=wants_sum, BLOCK=block, num_warps=warps(block),
            )  # fmt: skip
        return statistics, SavedLogits(logits)

    def losses(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """As ``ShardedSoftmax.losses``."""
        statistics, objective = statistics.contiguous(), self.objective
        ranks, _, tokens = statistics.shape
        losses = torch.empty(tokens, dtype=torch.float32, device=statistics.device)
        sums = torch.empty(2, tokens, dtype=torch.float32, device=statistics.device)
        if tokens:
            losses_kernel[(cdiv(tokens, LOSSES_BLOCK),)](
                statistics, self.ids, losses, sums, ranks, tokens, objective.ignore_index,
                SMOOTHING=objective.label_smoothing, Z_LOSS=objective.z_loss, VOCABULARY=self.vocabulary.vocabulary,
                BLOCK=LOSSES_BLOCK, num_warps=FEW_WARPS,
            )  # fmt: skip
        return losses, sums

    def save(self, logits: Tensor, sums: Tensor) -> SavedLogits:
        """As ``ShardedSoftmax.save``: the logits, which are not written to."""
        return SavedLogits(as_rows(logits))

    def gradient(self, saved: SavedLogits, sums: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
        """As ``ShardedSoftmax.gradient``."""
        logits, objective = saved.values, self.objective
        out = logits if out is None else out
        if not logits.numel():
            return out
        tokens, columns = logits.shape
        smoothing, vocabulary = objective.label_smoothing, self.vocabulary
        gradient_kernel[(tokens, cdiv(columns, GRADIENT_BLOCK))](
            logits, out, sums, self.ids, scale, logits.stride(0), out.stride(0), sums.stride(0),
            0 if scale is None else scale.stride(0), vocabulary.start, columns, objective.ignore_index,
            EVEN=smoothing / vocabulary.vocabulary, AT_TARGET=1 - smoothing, Z_LOSS=objective.z_loss,
            BLOCK=GRADIENT_BLOCK, num_warps=FEW_WARPS,
        )  # fmt: skip
        return out
