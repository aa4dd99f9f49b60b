"""Cross-entropy of one rank's part of the logits: statistics in one read, and the gradient from them in one more."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from argonne.kernels.gpu.launch import as_rows, warps
from argonne.parallel.cross_entropy import Kept, Targets

STATISTICS_BLOCK, GRADIENT_BLOCK = 8192, 2048
"""Columns at a time."""
GRADIENT_WARPS = 4
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _add(values, top, exponentials):
    """A block's values added to the sum of exponentials above ``top``, which may rise."""
    higher = tl.maximum(top, tl.max(values, 0))
    return higher, exponentials * tl.exp(top - higher) + tl.exp(values - higher)


@triton.jit
def statistics_kernel(
    logits, target, mine, said, stride, tokens, columns, WANTS_SUM: tl.constexpr, BLOCK: tl.constexpr
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
    tl.store(said + row, top)
    tl.store(said + tokens + row, tl.sum(exponentials, 0))
    owns = tl.load(mine + row) != 0
    own = tl.load(start_of_row + tl.load(target + row), owns, other=-float("inf")).to(tl.float32)
    tl.store(said + 2 * tokens + row, own)
    if WANTS_SUM:
        tl.store(said + 3 * tokens + row, total)


@triton.jit
def _gradient(values, column, top, log_total, factor, even, at_target, own):
    """Of a block of logits; ``own`` is the target's column, or -1."""
    gradient = tl.exp(values.to(tl.float32) - top - log_total) * factor - even
    return tl.where(column == own, gradient - at_target, gradient)


@triton.jit
def gradient_kernel(
    logits, out, sums, target, mine, factor, scale, stride, out_stride, tokens, columns,
    EVEN: tl.constexpr, AT_TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``factor * softmax - EVEN * scale``, and ``- AT_TARGET * scale`` in the target's column; ``out`` may be logits.

    EVEN is label smoothing over the vocabulary's size, AT_TARGET is 1 - label smoothing.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    top, log_total = tl.load(sums + row), tl.load(sums + tokens + row)
    given, factor = tl.load(scale + row), tl.load(factor + row)
    even, at_target = EVEN * given, AT_TARGET * given
    own = tl.where(tl.load(mine + row) != 0, tl.load(target + row), -1)
    source, sink = logits + row * stride + column, out + row * out_stride + column
    if start + BLOCK <= columns:
        gradient = _gradient(tl.load(source), column, top, log_total, factor, even, at_target, own)
        tl.store(sink, gradient.to(out.dtype.element_ty))
    else:
        mask = column < columns
        values = tl.load(source, mask, other=0.0)
        gradient = _gradient(values, column, top, log_total, factor, even, at_target, own)
        tl.store(sink, gradient.to(out.dtype.element_ty), mask)


class TritonTargets(Targets):
    """``Targets`` whose arithmetic is these kernels; nothing as wide as the vocabulary is allocated in float32."""

    def statistics(self, logits: Tensor) -> tuple[Tensor, Kept]:
        """As ``Targets.statistics``; what is kept are the logits themselves."""
        if not logits.numel():
            return super().statistics(logits)
        logits = as_rows(logits)
        tokens, columns = logits.shape
        wants_sum = self.objective.label_smoothing > 0
        block = min(STATISTICS_BLOCK, triton.next_power_of_2(columns))
        said = torch.empty(4 if wants_sum else 3, tokens, dtype=torch.float32, device=logits.device)
        statistics_kernel[(tokens,)](
            logits, self.rows, self.mine, said, logits.stride(0), tokens, columns, WANTS_SUM=wants_sum,
            BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
        return said, Kept(logits)

    def keep(self, logits: Tensor, sums: Tensor) -> Kept:
        """As ``Targets.keep``: the logits, which are not written to."""
        return Kept(as_rows(logits))

    def gradient(self, kept: Kept, sums: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
        """As ``Targets.gradient``."""
        logits = kept.values
        out = logits if out is None else out
        if not logits.numel():
            return out
        tokens, columns = logits.shape
        scale, factor = self.factors(sums, scale)
        smoothing = self.objective.label_smoothing
        gradient_kernel[(tokens, triton.cdiv(columns, GRADIENT_BLOCK))](
            logits, out, sums.contiguous(), self.rows, self.mine, factor, scale, logits.stride(0), out.stride(0),
            tokens, columns, EVEN=smoothing / self.vocabulary.vocabulary, AT_TARGET=1 - smoothing,
            BLOCK=GRADIENT_BLOCK, num_warps=GRADIENT_WARPS,
        )  # fmt: skip
        return out
