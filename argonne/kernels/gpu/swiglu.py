"""SwiGLU of two rows of any stride: two tensors, or the halves of a packed one."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from argonne.kernels.gpu.launch import Wrap, as_rows, cdiv, differentiable, direct, within_op

BLOCK = 1024
"""Columns of a row that a program computes."""
NUM_WARPS = 4


@triton.jit
def forward_kernel(gate, up, out, gate_stride, up_stride, columns, BLOCK: tl.constexpr):
    """``silu(gate) * up`` of a part of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    g = tl.load(gate + row * gate_stride + column, mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask, other=0.0).to(tl.float32)
    silu = g / (1.0 + tl.exp(-g))
    tl.store(out + row * columns + column, (silu * u).to(out.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    gate, up, gradient, dgate, dup, gate_stride, up_stride, gradient_stride, out_stride, columns, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradients of both; they lie in rows of ``out_stride``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    g = tl.load(gate + row * gate_stride + column, mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask, other=0.0).to(tl.float32)
    d = tl.load(gradient + row * gradient_stride + column, mask, other=0.0).to(tl.float32)
    # 1 - sigmoid would lose its digits where the sigmoid is near 1. Bounded: infinity times 0 is no number.
    decay = tl.minimum(tl.exp(-g), 1e30)
    sigmoid = 1.0 / (1.0 + decay)
    slope = sigmoid + g * sigmoid * (decay * sigmoid)
    tl.store(dgate + row * out_stride + column, (d * u * slope).to(dgate.dtype.element_ty), mask)
    tl.store(dup + row * out_stride + column, (d * (g * sigmoid)).to(dup.dtype.element_ty), mask)


def forward(gate: Tensor, up: Tensor | None, wrap: Wrap = direct) -> Tensor:
    """``[..., columns]`` of gate and up, or of the packed ``gate`` ``[..., 2 * columns]`` alone."""
    first, second = _halves(gate, up)
    out = torch.empty(*gate.shape[:-1], first.shape[1], dtype=gate.dtype, device=gate.device)
    if out.numel():
        rows, columns = first.shape
        wrap(forward_kernel)[(rows, cdiv(columns, BLOCK))](
            first, second, out, first.stride(0), second.stride(0), columns, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out


def backward(gradient: Tensor, gate: Tensor, up: Tensor | None, wrap: Wrap = direct) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; of the packed one, and an empty tensor."""
    first, second = _halves(gate, up)
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = gate.new_empty(0) if up is None else torch.empty_like(dgate)
    if dgate.numel():
        rows, columns = first.shape
        into, beside = _halves(dgate, None if up is None else dup)
        given = as_rows(gradient)
        wrap(backward_kernel)[(rows, cdiv(columns, BLOCK))](
            first, second, given, into, beside, first.stride(0), second.stride(0), given.stride(0), into.stride(0),
            columns, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return dgate, dup


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = as_rows(gate)
    if up is not None:
        return rows, as_rows(up)
    columns = rows.shape[1] // 2
    return rows[:, :columns], rows[:, columns:]


def composite_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    """As ``forward``, in torch."""
    g, u = gate.chunk(2, -1) if up is None else (gate, up)
    accurate = torch.promote_types(g.dtype, torch.float32)
    g = g.to(accurate)
    return (g * g.sigmoid() * u).to(gate.dtype).contiguous()


def composite_backward(gradient: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """As ``backward``, in torch."""
    g, u = gate.chunk(2, -1) if up is None else (gate, up)
    accurate = torch.promote_types(g.dtype, torch.float32)
    g, u, d = (part.to(accurate) for part in (g, u, gradient))
    sigmoid = g.sigmoid()
    dgate = (d * u * (sigmoid + g * sigmoid * (-g).sigmoid())).to(gate.dtype)
    dup = (d * g * sigmoid).to(gate.dtype)
    if up is None:
        return torch.cat((dgate, dup), -1), gate.new_empty(0)
    return dgate.contiguous(), dup.contiguous()


@triton_op("argonne::swiglu", mutates_args=())
def op(gate: Tensor, up: Tensor | None) -> Tensor:
    """See ``forward``."""
    return within_op(forward, composite_forward, gate, gate, up)


@triton_op("argonne::swiglu_backward", mutates_args=())
def backward_op(gradient: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``backward``."""
    return within_op(backward, composite_backward, gate, gradient, gate, up)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(launch: Any, ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    dgate, dup = launch(gradient, gate, up)
    return dgate, None if up is None else dup


call = differentiable(op, forward, _setup, _gradients, backward_op, backward)
"""``call(gate, up)``: as ``forward``, with gradients."""
