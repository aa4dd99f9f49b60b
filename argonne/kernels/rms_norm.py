"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Args:
        x: ``[..., hidden]``; half-width input is computed in float32 and rounded once.
        weight: ``[hidden]``.
        eps: added to the mean square.

    Returns:
        ``[..., hidden]`` in the dtype of ``x``.
    """
    accurate = torch.promote_types(x.dtype, torch.float32)
    values = x.to(accurate)
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return (values * scale * weight.to(accurate)).to(x.dtype)
