"""The arithmetic of rotary position embedding: its tables, and the reference that the GPU program is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Radians by which each pair of a head turns from a position to the next: float64 ``[head_dim / 2]``.

    Of pair *i*, ``theta^(-2i / head_dim)``.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return theta**-exponent


def rope_tables(
    positions: int, head_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, each ``[positions, head_dim / 2]``: a position times ``rope_frequencies``."""
    return tables_of(positions, rope_frequencies(head_dim, theta), dtype)


def tables_of(
    positions: int, frequencies: Tensor, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The tables of other ``frequencies`` (float64 ``[head_dim / 2]``), times ``scale``.

    Computed in float64: in float32 the product is off by up to ``p * 6e-8`` radians at position *p*.
    """
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    """The reference of ``apply_rope``."""
    half, where = cos.shape[1], slice(x.shape[-3]) if positions is None else positions
    c, s = cos[where].unsqueeze(-2), sin[where].unsqueeze(-2)
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = (first * c - second * s, second * c + first * s)
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, dim=-1).to(x.dtype)
