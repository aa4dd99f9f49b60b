"""Root-mean-square normalisation (arXiv 1910.07467), alone or of a sum that is kept."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from argonne.kernels.dispatch import Backend, refuse, uses_triton


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: None = None, backend: Backend = "auto") -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, backend: Backend = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """``s / sqrt(mean(s^2) + eps) * weight`` over the last dimension, of ``s = x`` or ``s = x + residual``.

    Half-width input is computed in float32; ``s`` and the result are each rounded once.

    Args:
        x: ``[..., hidden]``, any strides.
        weight: ``[hidden]``, of any floating dtype.
        eps: added to the mean square.
        residual: like ``x``; to be added first.
        backend: ``torch``, ``triton`` or ``auto``.

    Returns:
        ``[..., hidden]`` in the dtype of ``x``; with a residual also ``s``.

    Raises:
        KernelError: the shapes or dtypes do not fit, or the backend cannot compute them.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        refuse("weight", list(weight.shape), f"{list(x.shape[-1:])} as in x")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        refuse("residual", f"{list(residual.shape)} {residual.dtype}", f"{list(x.shape)} {x.dtype} as x")
    if uses_triton(backend, x=x, weight=weight, residual=residual):
        from argonne.kernels.gpu.rms_norm import call

        y, total, _ = call(x, residual, weight, eps)
        return y if residual is None else (y, total)
    accurate = torch.promote_types(x.dtype, torch.float32)
    if residual is None:
        return _reference(x.to(accurate), weight, eps).to(x.dtype)
    values = x.to(accurate) + residual
    total = values.to(x.dtype)
    if total.dtype != accurate:
        # The norm is of the rounded sum, but the two gradients of the sum are added before they are rounded.
        values = values + (total.to(accurate) - values).detach()
    return _reference(values, weight, eps).to(x.dtype), total


def _reference(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return values * scale * weight.to(values.dtype)
