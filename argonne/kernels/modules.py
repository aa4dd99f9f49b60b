"""The kernels as modules, for models that are put together of modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from argonne.kernels.dispatch import Backend
from argonne.kernels.rms_norm import rms_norm
from argonne.kernels.rope import apply_rope
from argonne.kernels.rotation import rope_tables
from argonne.kernels.swiglu import swiglu


class RMSNorm(nn.Module):
    """``rms_norm`` with its weight ``[hidden]``, at first 1."""

    def __init__(
        self, hidden: int, eps: float = 1e-6, *, dtype: torch.dtype | None = None, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.ones(hidden, dtype=dtype))

    @property
    def weights(self) -> Sequence[Tensor]:
        """The weight; a subclass may have one for each of several runs of rows, as of ``rms_norm``."""
        return (self.weight,)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``[..., hidden]`` -> the same; with a residual the norm of ``x + residual``, and that sum."""
        return rms_norm(x, self.weights, self.eps, residual=residual, backend=self.backend)


class RotaryEmbedding(nn.Module):
    """``apply_rope`` with its tables, which no state dict holds: they follow from the arguments.

    ``width`` is that of a head, or of the part of it that turns.
    """

    def __init__(self, positions: int, width: int, theta: float = 1e4, *, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.cos: Tensor
        self.sin: Tensor
        for name, table in zip(("cos", "sin"), rope_tables(positions, width, theta), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """``[..., sequence, heads, head_dim]`` -> the same."""
        return apply_rope(x, self.cos, self.sin, positions=positions, backend=self.backend)


class SwiGLU(nn.Module):
    """``swiglu`` of a packed ``[..., 2 * columns]``, or of gate and up."""

    def __init__(self, *, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend = backend

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """``[..., columns]``."""
        return swiglu(gate, up, backend=self.backend)
