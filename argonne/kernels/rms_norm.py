"""Root-mean-square normalisation (arXiv 1910.07467), alone or of a sum that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from argonne.kernels.dispatch import Backend, refuse, uses_triton
from argonne.parallel.recomputed import recomputed
from argonne.parallel.tensor_parallel.token_blocks import in_token_blocks, scale_tokens


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    eps: float,
    *,
    residual: None = None,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    eps: float,
    *,
    residual: Tensor,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    eps: float,
    *,
    residual: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``s / sqrt(mean(s^2) + eps) * weight`` over the last dimension, of ``s = x`` or ``s = x + residual``.

    Half-width input is computed in float32; ``s`` and the result are each rounded once.

    Args:
        x: ``[..., hidden]``, any strides.
        weight: ``[hidden]``, of any floating dtype; or several of the same values, one for each of as many equal runs
            of rows, of which each has its own gradient (``parallel/tensor_parallel/token_blocks.py``).
        eps: added to the mean square.
        residual: like ``x``; to be added first.

    Returns:
        ``[..., hidden]`` in the dtype of ``x``; with a residual also ``s``.

    Raises:
        KernelError: the shapes or dtypes do not fit, or the backend cannot compute them.
    """
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    for of_block in weights:
        if x.dim() == 0 or of_block.shape != x.shape[-1:]:
            refuse("weight", list(of_block.shape), f"{list(x.shape[-1:])} as in x")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        refuse("residual", f"{list(residual.shape)} {residual.dtype}", f"{list(x.shape)} {x.dtype} as x")
    triton = uses_triton(backend, x=x, weight=weights[0], residual=residual)
    return recomputed(_triton if triton else _torch, x, residual, eps, *weights)


def _torch(x: Tensor, residual: Tensor | None, eps: float, *weights: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    accurate = torch.promote_types(x.dtype, torch.float32)
    if residual is None:
        return _reference(x.to(accurate), weights, eps).to(x.dtype)
    values = x.to(accurate) + residual
    total = values.to(x.dtype)
    if total.dtype != accurate:
        # The norm is of the rounded sum, but the two gradients of the sum are added before they are rounded.
        values = values + (total.to(accurate) - values).detach()
    return _reference(values, weights, eps).to(x.dtype), total


def _reference(values: Tensor, weights: Sequence[Tensor], eps: float) -> Tensor:
    normal = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return scale_tokens(normal, [weight.to(values.dtype) for weight in weights])


def _triton(x: Tensor, residual: Tensor | None, eps: float, *weights: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """One launch for each weight."""
    from argonne.kernels.gpu.rms_norm import call

    if len(weights) == 1:
        y, total, _ = call(x, residual, weights[0], eps)
    else:
        rows = in_token_blocks(x, len(weights))
        others = [None] * len(weights) if residual is None else in_token_blocks(residual, len(weights))
        parts = [call(own, other, weight, eps)[:2] for own, other, weight in zip(rows, others, weights, strict=True)]
        y, total = (torch.stack(found).view(x.shape) for found in zip(*parts, strict=True))
    return y if residual is None else (y, total)
