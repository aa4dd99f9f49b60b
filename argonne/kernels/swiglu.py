"""The gated activation of the feed-forward layer (arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from argonne.kernels.dispatch import Backend, refuse, uses_triton
from argonne.parallel.recomputed import recomputed

VECTOR = 64
"""Columns at a multiple of which no vector instruction of any CPU leaves a rest to be computed one by one."""


def swiglu(gate: Tensor, up: Tensor | None = None, *, pinned: bool = False, backend: Backend = "auto") -> Tensor:
    """``silu(gate) * up``, elementwise; half-width input is computed in float32 and rounded once.

    Args:
        gate: ``[..., columns]``, any strides; or, without ``up``, ``[..., 2 * columns]``: gate, then up.
        up: like ``gate``.
        pinned: give each element the same bits wherever it lies. PyTorch's sigmoid on a CPU has others for the last
            few of a run, where its length is no multiple of ``VECTOR``; this way takes longer there.

    Returns:
        ``[..., columns]`` in the dtype of ``gate``.

    Raises:
        KernelError: the shapes or dtypes do not fit, or the backend cannot compute them.
    """
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            refuse("gate", list(gate.shape), "an even last size, without up")
    elif gate.dim() == 0 or up.shape != gate.shape or up.dtype != gate.dtype:
        refuse("up", f"{list(up.shape)} {up.dtype}", f"{list(gate.shape)} {gate.dtype} as gate")
    return recomputed(_triton if uses_triton(backend, gate=gate, up=up) else _torch, gate, up, pinned)


def _triton(gate: Tensor, up: Tensor | None, pinned: bool) -> Tensor:
    from argonne.kernels.gpu.swiglu import call

    found: Tensor = call(gate, up)
    return found


def _torch(gate: Tensor, up: Tensor | None, pinned: bool) -> Tensor:
    accurate = torch.promote_types(gate.dtype, torch.float32)
    if up is None:
        if gate.dtype == accurate and not (pinned or torch.compiler.is_compiling()):
            found: Tensor = _PackedSwiglu.apply(gate)
            return found
        gate, up = gate.chunk(2, dim=-1)
    silu = _PinnedSilu.apply if pinned else F.silu
    return (silu(gate.to(accurate)) * up.to(accurate)).to(gate.dtype)


class _PackedSwiglu(torch.autograd.Function):
    """Of gate and up in one tensor: their gradients are made in one, where autograd would copy them together."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        gate, up = packed.chunk(2, dim=-1)
        silu = F.silu(gate)
        ctx.save_for_backward(packed, silu)
        return silu * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        packed, silu = ctx.saved_tensors
        gate, up = packed.chunk(2, dim=-1)
        both = torch.empty_like(packed)
        of_gate, of_up = both.chunk(2, dim=-1)
        torch.mul(gradient, silu, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return both


class _PinnedSilu(torch.autograd.Function):
    """``x * sigmoid(x)`` of operations whose every element is computed alike: exponentials, sums and quotients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        sigmoid = torch.exp(-x).add_(1).reciprocal_()
        ctx.save_for_backward(x, sigmoid)
        return x * sigmoid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, sigmoid = ctx.saved_tensors
        return torch.rsub(sigmoid, 1).mul_(x).add_(1).mul_(sigmoid).mul_(gradient)
