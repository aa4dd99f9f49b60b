"""Root-mean-square normalisation (arXiv 1910.07467), alone or of a sum that is kept."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from argonne.kernels.dispatch import Backend, refuse, uses_triton
from argonne.parallel.tensor_parallel.token_blocks import in_token_blocks


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: None = None,
    token_blocks: int | None = None,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor,
    token_blocks: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    token_blocks: int | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``s / sqrt(mean(s^2) + eps) * weight`` over the last dimension, of ``s = x`` or ``s = x + residual``.

    Half-width input is computed in float32; ``s`` and the result are each rounded once.

    Args:
        x: ``[..., hidden]``, any strides.
        weight: ``[hidden]``, of any floating dtype.
        eps: added to the mean square.
        residual: like ``x``; to be added first.
        token_blocks: add up the weight's gradient within so many equal runs of rows, and these as one aligned tree
            (``parallel/tensor_parallel/token_blocks.py``); in one go when left out.
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
        y, total = _triton(x, residual, weight, eps, token_blocks)
        return y if residual is None else (y, total)
    accurate = torch.promote_types(x.dtype, torch.float32)
    if residual is None:
        return _reference(x.to(accurate), weight, eps, token_blocks).to(x.dtype)
    values = x.to(accurate) + residual
    total = values.to(x.dtype)
    if total.dtype != accurate:
        # The norm is of the rounded sum, but the two gradients of the sum are added before they are rounded.
        values = values + (total.to(accurate) - values).detach()
    return _reference(values, weight, eps, token_blocks).to(x.dtype), total


def _reference(values: Tensor, weight: Tensor, eps: float, token_blocks: int | None) -> Tensor:
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    normal, weight = values * scale, weight.to(values.dtype)
    if token_blocks is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return normal * weight
    rows, of_blocks = in_token_blocks(normal, weight, token_blocks)
    return (rows * of_blocks).view(values.shape)


def _triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, token_blocks: int | None
) -> tuple[Tensor, Tensor]:
    """The norm and the sum, in one launch; in one for each token block where the weight's gradient asks for it."""
    from argonne.kernels.gpu.rms_norm import call

    if token_blocks is None or not (torch.is_grad_enabled() and weight.requires_grad):
        y, total, _ = call(x, residual, weight, eps)
        return y, total
    rows, weights = in_token_blocks(x, weight, token_blocks)
    others = [None] * token_blocks if residual is None else residual.reshape(rows.shape).unbind()
    parts = [call(*part, own[0], eps)[:2] for *part, own in zip(rows.unbind(), others, weights.unbind(), strict=True)]
    y, total = (torch.stack(found).view(x.shape) for found in zip(*parts, strict=True))
    return y, total
