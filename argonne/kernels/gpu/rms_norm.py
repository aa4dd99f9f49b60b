"""RMSNorm, alone or with the residual addition before it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from argonne.kernels.gpu.launch import Wrap, as_rows, cdiv, differentiable, direct, power_of_2, warps, within_op

PARTIAL_SUMS = 264
"""Sums that the weight's gradient is first taken in: 2 for each of an H100's 132 multiprocessors. A constant, so
that the bits depend neither on the card nor on its load."""


@dataclass(frozen=True)
class Plan:
    """How a width is computed."""

    is_wide: bool
    """A row is computed in blocks of columns."""
    block: int
    """Columns at a time."""
    rows: int
    """Rows at a time."""
    num_warps: int

    @classmethod
    @functools.cache
    def of(cls, columns: int, widest: int) -> Plan:
        """All columns at once up to ``widest``, beyond which registers would spill."""
        block = WIDE_BLOCK if columns > widest else power_of_2(columns)
        rows = 1 if columns > widest else max(1, 2048 // block)
        return cls(columns > widest, block, rows, warps(block * rows))


FORWARD_WIDEST, BACKWARD_WIDEST = 16384, 8192
WIDE_BLOCK = 4096


@triton.jit
def forward_kernel(
    x, residual, weight, y, total, scale, x_stride, residual_stride, rows, columns,
    EPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Whole rows; ``total`` is x + residual, rounded, and the norm is of what was rounded."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    values = tl.load(x + row * x_stride + column, mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * residual_stride + column, mask, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * columns + column, rounded, mask)
        values = rounded.to(tl.float32)
    mean = tl.sum(values * values, 1) / columns
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + EPS))[:, None]
    tl.store(scale + row, inverse, row < rows)
    gain = tl.load(weight + column, column < columns, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, (values * inverse * gain).to(y.dtype.element_ty), mask)


@triton.jit
def wide_forward_kernel(
    x, residual, weight, y, total, scale, x_stride, residual_stride, rows, columns,
    EPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A row in blocks of columns, read twice."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + offset
        mask = column < columns
        values = tl.load(x + row * x_stride + column, mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            values += tl.load(residual + row * residual_stride + column, mask, other=0.0).to(tl.float32)
            rounded = values.to(total.dtype.element_ty)
            tl.store(total + row * columns + column, rounded, mask)
            values = rounded.to(tl.float32)
        squares += values * values
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 0) / columns + EPS))
    tl.store(scale + row, inverse)
    for start in range(0, columns, BLOCK):
        column = start + offset
        mask = column < columns
        if HAS_RESIDUAL:
            values = tl.load(total + row * columns + column, mask, other=0.0).to(tl.float32)
        else:
            values = tl.load(x + row * x_stride + column, mask, other=0.0).to(tl.float32)
        gain = tl.load(weight + column, mask, other=0.0).to(tl.float32)
        tl.store(y + row * columns + column, (values * inverse * gain).to(y.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    x, weight, scale, dy, dtotal, dx, dweight, x_stride, dy_stride, dtotal_stride, rows, columns,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every PARTIAL_SUMS-th tile of rows, and their sum for the weight: row ``program_id`` of ``dweight``."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < columns
    gain = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & inside
        values = tl.load(x + row * x_stride + column, mask, other=0.0).to(tl.float32)
        gradient = tl.load(dy + row * dy_stride + column, mask, other=0.0).to(tl.float32)
        inverse = tl.load(scale + row, row < rows, other=0.0)
        normal = values * inverse
        sums += gradient * normal
        gradient *= gain
        shared = tl.sum(gradient * normal, 1)[:, None] / columns
        gradient = (gradient - normal * shared) * inverse
        if HAS_RESIDUAL:
            gradient += tl.load(dtotal + row * dtotal_stride + column, mask, other=0.0).to(tl.float32)
        tl.store(dx + row * columns + column, gradient.to(dx.dtype.element_ty), mask)
    tl.store(dweight + tl.program_id(0) * columns + column, tl.sum(sums, 0)[None, :], inside)


@triton.jit
def wide_dx_kernel(
    x, weight, scale, dy, dtotal, dx, x_stride, dy_stride, dtotal_stride, columns,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The input's gradient of a row in blocks of columns, read twice."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    inverse = tl.load(scale + row)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + offset
        mask = column < columns
        values = tl.load(x + row * x_stride + column, mask, other=0.0).to(tl.float32)
        gradient = tl.load(dy + row * dy_stride + column, mask, other=0.0).to(tl.float32)
        products += gradient * values * tl.load(weight + column, mask, other=0.0).to(tl.float32)
    shared = tl.sum(products, 0) * inverse / columns
    for start in range(0, columns, BLOCK):
        column = start + offset
        mask = column < columns
        values = tl.load(x + row * x_stride + column, mask, other=0.0).to(tl.float32)
        gradient = tl.load(dy + row * dy_stride + column, mask, other=0.0).to(tl.float32)
        gradient *= tl.load(weight + column, mask, other=0.0).to(tl.float32)
        gradient = (gradient - values * inverse * shared) * inverse
        if HAS_RESIDUAL:
            gradient += tl.load(dtotal + row * dtotal_stride + column, mask, other=0.0).to(tl.float32)
        tl.store(dx + row * columns + column, gradient.to(dx.dtype.element_ty), mask)


@triton.jit
def wide_dweight_kernel(
    x, scale, dy, dweight, x_stride, dy_stride, rows, columns, BLOCK: tl.constexpr
):  # fmt: skip
    """Partial sums of the weight's gradient for a block of columns."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    sums = tl.zeros([BLOCK], tl.float32)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        values = tl.load(x + row * x_stride + column, mask, other=0.0).to(tl.float32)
        gradient = tl.load(dy + row * dy_stride + column, mask, other=0.0).to(tl.float32)
        sums += gradient * values * tl.load(scale + row)
    tl.store(dweight + tl.program_id(0) * columns + column, sums, mask)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, wrap: Wrap = direct
) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``x + residual`` (empty without a residual) and the scale of each row ``[rows]`` in float32."""
    rows, given, weight = as_rows(x), None if residual is None else as_rows(residual), weight.contiguous()
    count, columns = rows.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y) if residual is not None else x.new_empty(0)
    scale = torch.empty(count, dtype=torch.float32, device=x.device)
    if y.numel():
        plan = Plan.of(int(columns), FORWARD_WIDEST)
        wrap(wide_forward_kernel if plan.is_wide else forward_kernel)[(cdiv(count, plan.rows),)](
            rows, given, weight, y, total, scale, rows.stride(0), 0 if given is None else given.stride(0),
            count, columns, EPS=eps, HAS_RESIDUAL=residual is not None, BLOCK=plan.block, ROWS=plan.rows,
            num_warps=plan.num_warps,
        )  # fmt: skip
    return y, total, scale


def backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, wrap: Wrap = direct
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` (what was normalised) and of the weight; ``dtotal`` is added to the former."""
    rows, gradient = as_rows(x), as_rows(dy)
    added, weight = None if dtotal is None else as_rows(dtotal), weight.contiguous()
    count, columns = rows.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not dx.numel():
        return dx, torch.zeros_like(weight)
    plan = Plan.of(int(columns), BACKWARD_WIDEST)
    programs = min(cdiv(count, plan.rows), PARTIAL_SUMS)
    sums = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    strides = rows.stride(0), gradient.stride(0)
    added_stride = 0 if added is None else added.stride(0)
    if not plan.is_wide:
        wrap(backward_kernel)[(programs,)](
            rows, weight, scale, gradient, added, dx, sums, *strides, added_stride, count, columns,
            HAS_RESIDUAL=added is not None, BLOCK=plan.block, ROWS=plan.rows, num_warps=plan.num_warps,
        )  # fmt: skip
    else:
        wrap(wide_dx_kernel)[(count,)](
            rows, weight, scale, gradient, added, dx, *strides, added_stride, columns,
            HAS_RESIDUAL=added is not None, BLOCK=plan.block, num_warps=plan.num_warps,
        )  # fmt: skip
        wrap(wide_dweight_kernel)[(programs, cdiv(columns, plan.block))](
            rows, scale, gradient, sums, *strides, count, columns, BLOCK=plan.block, num_warps=plan.num_warps
        )
    return dx, sums.sum(0).to(weight.dtype)


def composite_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As ``forward``, in torch."""
    accurate = torch.promote_types(x.dtype, torch.float32)
    values = x.to(accurate)
    total = x.new_empty(0)
    if residual is not None:
        total = (values + residual).to(x.dtype)
        values = total.to(accurate)
    scale = (values.square().mean(-1) + eps).rsqrt()
    y = (values * scale[..., None] * weight).to(x.dtype)
    return y.contiguous(), total.contiguous(), scale.flatten()


def composite_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``backward``, in torch."""
    scale = scale.view(x.shape[:-1])[..., None]
    normal, gradient = x.to(scale.dtype) * scale, dy.to(scale.dtype)
    dweight = (gradient * normal).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    gradient = gradient * weight
    dx = (gradient - normal * (gradient * normal).mean(-1, keepdim=True)) * scale
    return (dx if dtotal is None else dx + dtotal).to(x.dtype).contiguous(), dweight


@triton_op("argonne::rms_norm", mutates_args=())
def op(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See ``forward``."""
    return within_op(forward, composite_forward, x, x, residual, weight, eps)


@triton_op("argonne::rms_norm_backward", mutates_args=())
def backward_op(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See ``backward``."""
    return within_op(backward, composite_backward, x, dy, dtotal, x, weight, scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _ = inputs
    _, total, scale = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(*([scale] if ctx.has_residual else [total, scale]))
    ctx.save_for_backward(total if ctx.has_residual else x, weight, scale)


def _gradients(launch: Any, ctx: Any, dy: Tensor, dtotal: Tensor, dscale: Tensor) -> tuple[Any, ...]:
    dx, dweight = launch(dy, dtotal if ctx.has_residual else None, *ctx.saved_tensors)
    return dx, dx if ctx.has_residual else None, dweight, None


call = differentiable(op, forward, _setup, _gradients, backward_op, backward)
"""``call(x, residual, weight, eps)``: as ``forward``, with gradients."""
