"""Rotary position embedding, half-split as in Llama (arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(
    positions: int, head_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, each ``[positions, head_dim / 2]``.

    The angle of pair *i* at position *p* is ``p * theta^(-2i / head_dim)``. Computed in float64: in float32
    the product is off by up to ``p * 6e-8`` radians.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), theta**-exponent)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair ``(x[i], x[i + head_dim / 2])`` by its position's angle.

    Args:
        x: ``[..., sequence, head_dim]``.
        cos, sin: ``[sequence, head_dim / 2]``.

    Returns:
        The shape and dtype of ``x``: the tables' wider dtype is used inside and never leaks out, so that
        attention sees its compute dtype.
    """
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
