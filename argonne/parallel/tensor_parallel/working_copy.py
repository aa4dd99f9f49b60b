"""The weights of matrix products in the dtype that is computed in, cast once for all passes of a step.

``DataParallel`` says when the weights are new (``publish``), and each is then cast again, in place. Without one a layer
casts at every call, as it does under FSDP, which gathers in the compute dtype. So that no product ever sees old values,
a copy is cast anew, too, where the weight was written to, or lies elsewhere, since it was made. What autograd cannot
see is left to ``publish``: writing through ``.data``, or to another view of the memory, as ZeRO stage 1 does.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from argonne.parallel.sizes_only import is_sizes_only
from argonne.parallel.tensor_parallel.precision import Precision


class WorkingCopy:
    """That of one weight.

    Args:
        precision: the dtypes; where both are one there never is a copy.
        at_once: make it when the weight is published, and not where it is first asked for.
    """

    def __init__(self, precision: Precision, at_once: bool = True) -> None:
        self.at_once = at_once
        self._dtype, self._is_published, self._seen = precision.compute, False, (-1, -1)
        self._copy: Tensor | None = None

    @property
    def bytes(self) -> int:
        """What it takes by now."""
        return 0 if self._copy is None else self._copy.nbytes

    def publish(self, weight: Tensor) -> None:
        """``weight`` has the values of the passes to come."""
        self._is_published = weight.dtype != self._dtype
        if self._is_published and (self.at_once or self._copy is not None):
            self._cast(weight)

    def of(self, weight: Tensor) -> Tensor | None:
        """The copy of ``weight``, without a gradient; None where it is to be cast."""
        if not self._is_published:
            return None
        if not torch.compiler.is_compiling() and self._seen != _state(weight):
            self._cast(weight)
        return self._copy

    @torch.no_grad()
    def _cast(self, weight: Tensor) -> None:
        if self._copy is None or self._copy.shape != weight.shape or self._copy.device != weight.device:
            self._copy = torch.empty_like(weight, dtype=self._dtype)
        self._copy.copy_(weight)
        self._seen = _state(weight)


@runtime_checkable
class KeepsWorkingCopy(Protocol):
    """A module that has a copy of its weight."""

    working: WorkingCopy
    weight: nn.Parameter


class _Working(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()  # the same memory, whose versions autograd compares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.to(ctx.dtype), None


def in_dtype(weight: Tensor, dtype: torch.dtype, copy: Tensor | None) -> Tensor:
    """``weight`` in ``dtype``, with its gradient: the ``copy`` where there is one, a cast otherwise."""
    if copy is None:
        return weight.to(dtype)
    if not torch.is_grad_enabled():
        return copy
    working: Tensor = _Working.apply(weight, copy)
    return working


def _state(weight: Tensor) -> tuple[int, int]:
    """What is another where a weight was written to, or has other memory."""
    return int(weight._version), 0 if is_sizes_only() else weight.data_ptr()
