"""What lies between the products of a decoder's block, of one position of each row: in as few operations as can be.

A CPU multiplies one row by a layer's weights in some hundred microseconds. Modules, checks and views, which nobody
notices beside a whole sequence, would take as long as that (docs/log.md). The values are those of ``argonne.kernels``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``kernels.rms_norm`` of ``[rows, hidden]``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    return (wide * square.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()).mul_(weight).to(x.dtype)


def gated(x: Tensor) -> Tensor:
    """``kernels.swiglu`` of packed ``[rows, 2 * columns]``."""
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return F.silu(gate).mul_(up).to(x.dtype)


def whole_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``[rows, head_dim / 2]`` cosines and sines as ``turned`` takes them: ``[rows, 1, head_dim]``."""
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``kernels.apply_rope`` of ``[rows, heads, head_dim]``, each row at its position of the ``whole_tables``."""
    wide = x.to(cos.dtype)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
