"""The gated activation of the feed-forward layer (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, elementwise; half-width input is computed in float32 and rounded once."""
    accurate = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(accurate)) * up.to(accurate)).to(gate.dtype)
