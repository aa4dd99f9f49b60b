"""The gated activation of the feed-forward layer (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from argonne.kernels.dispatch import Backend, refuse, uses_triton


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """``silu(gate) * up``, elementwise; half-width input is computed in float32 and rounded once.

    Args:
        gate: ``[..., columns]``, any strides; or, without ``up``, ``[..., 2 * columns]``: gate, then up.
        up: like ``gate``.
        backend: ``torch``, ``triton`` or ``auto``.

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
    if uses_triton(backend, gate=gate, up=up):
        from argonne.kernels.gpu.swiglu import call

        return call(gate, up)
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    accurate = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(accurate)) * up.to(accurate)).to(gate.dtype)
