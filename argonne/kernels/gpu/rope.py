"""Rotary position embedding of heads that lie in rows of any stride."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import triton_op

from argonne.kernels.gpu.launch import Wrap, cdiv, differentiable, direct, within_op
from argonne.kernels.rotation import rotated

BLOCK = 1024
"""Elements of a row that a program turns: heads lie behind each other, so that a width such as 170 does not matter."""
NUM_WARPS = 4


@triton.jit
def rotate_kernel(
    x, out, cos, sin, positions, length, columns, batch_stride, row_stride, head_stride, out_stride, pairs,
    WIDTH: tl.constexpr, ROTATED: tl.constexpr, SIGN: tl.constexpr, HAS_POSITIONS: tl.constexpr, DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of a row of heads, which has ``columns`` elements; those of a head past ``ROTATED`` are copied.

    With DENSE the heads lie behind each other: the compiler then sees a run of addresses, and loads 128 bits at once.
    """
    row = tl.program_id(0).to(tl.int64)
    source = x + (row // length) * batch_stride + (row % length) * row_stride
    position = tl.load(positions + row) if HAS_POSITIONS else row % length
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < columns
    head = element // WIDTH
    within = element - head * WIDTH
    half: tl.constexpr = ROTATED // 2
    turns = mask & (within < ROTATED)
    second = within >= half
    pair = tl.where(second, within - half, within)
    start = source + head.to(tl.int64) * head_stride
    own = source + element if DENSE else start + within
    value = tl.load(own, mask, other=0.0).to(tl.float32)
    partner = tl.load(start + tl.where(second, within - half, within + half), turns, other=0.0).to(tl.float32)
    angle = position.to(tl.int64) * pairs + pair
    c = tl.load(cos + angle, turns, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, turns, other=0.0).to(tl.float32)
    s = tl.where(second, SIGN * s, -SIGN * s)
    tl.store(out + row * out_stride + element, (value * c + partner * s).to(out.dtype.element_ty), mask)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    sign: float,
    out: Tensor | None = None,
    wrap: Wrap = direct,
) -> Tensor:
    """``[batch, sequence, heads, head_dim]`` turned by ``sign`` times each position's angle.

    ``out``, if given, has that shape, heads that lie behind each other and batches of ``sequence`` rows: it may be
    a run of heads of a packed tensor.
    """
    batch, length, heads, width = x.shape
    if x.stride(3) != 1 and width > 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    if out is None:
        out = torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device)
    if x.numel():
        columns = heads * width
        wrap(rotate_kernel)[(batch * length, cdiv(columns, BLOCK))](
            x, out, cos, sin, positions, length, columns, *x.stride()[:3], out.stride(1), cos.shape[1],
            WIDTH=width, ROTATED=2 * cos.shape[1], SIGN=sign, HAS_POSITIONS=positions is not None,
            DENSE=x.stride(2) == width, BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def composite(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, sign: float) -> Tensor:
    """As ``rotate``, in torch."""
    return rotated(x, cos, sign * sin, None if positions is None else positions.view(x.shape[:2])).contiguous()


@triton_op("argonne::rope", mutates_args=())
def op(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, sign: float) -> Tensor:
    """See ``rotate``."""
    return within_op(partial(rotate, out=None), composite, x, x, cos, sin, positions, sign)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, ctx.sign = inputs
    ctx.save_for_backward(cos, sin, positions)


def _gradients(launch: Any, ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return launch(gradient, *ctx.saved_tensors, -ctx.sign), None, None, None, None


call = differentiable(op, rotate, _setup, _gradients, op, rotate)
"""``call(x, cos, sin, positions, sign)``: as ``rotate``, with gradients: a turn back."""


class _Packed(torch.autograd.Function):
    """Queries and keys of packed rows in one launch; each gradient goes where the packed one has its place."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, heads: list[int]) -> Any:
        ctx.save_for_backward(cos, sin, positions)
        turned = rotate(qkv[:, :, : -heads[2]], cos, sin, positions, 1.0)
        return *turned.split(heads[:2], 2), qkv[:, :, -heads[2] :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        heads = [gradient.shape[2] for gradient in gradients]
        batch, length, _, width = gradients[0].shape
        packed = gradients[0].new_empty(batch, length, sum(heads), width)
        query, key, value = packed.split(heads, 2)
        cos, sin, positions = ctx.saved_tensors
        rotate(gradients[0], cos, sin, positions, -1.0, out=query)
        rotate(gradients[1], cos, sin, positions, -1.0, out=key)
        value.copy_(gradients[2])
        return packed, None, None, None, None


def call_packed(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, heads: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``[batch, sequence, sum of heads, head_dim]`` as its three parts, the first two turned."""
    if torch.compiler.is_compiling():
        turned = call(qkv[:, :, : -heads[2]], cos, sin, positions, 1.0)
        return *turned.split(heads[:2], 2), qkv[:, :, -heads[2] :]
    return _Packed.apply(qkv, cos, sin, positions, heads)
