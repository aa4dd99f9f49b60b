"""The arithmetic of rotary position embedding: its tables, and the reference that the GPU program is held to."""

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


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    """The reference of ``apply_rope``."""
    half, where = cos.shape[1], slice(x.shape[-3]) if positions is None else positions
    c, s = cos[where].unsqueeze(-2), sin[where].unsqueeze(-2)
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = (first * c - second * s, second * c + first * s)
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, dim=-1).to(x.dtype)
