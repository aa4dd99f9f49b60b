"""The uses of one weight whose gradients are sums of their own, which come last: see ``ShardedParameter.aliases``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Uses:
    """Gives each of ``count`` uses of a weight a leaf of its own for autograd.

    That is an alias, a parameter of the same memory; or, where the weight of a pass is not what is updated (FSDP), the
    weight itself, with gradients that go to ``taken`` and not to it.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.taken: Callable[[list[Tensor]], None] | None = None
        """Is given the gradients of all uses after each backward pass."""
        self._weight: Tensor | None = None
        self._aliases: tuple[nn.Parameter, ...] = ()

    def of(self, weight: Tensor) -> tuple[Tensor, ...]:
        """``weight``, once for each use."""
        if self.taken is None:
            return self.aliases(weight)
        diverted: tuple[Tensor, ...] = _Divert.apply(weight, self)
        return diverted

    def aliases(self, weight: Tensor) -> tuple[nn.Parameter, ...]:
        """Those of this ``weight``: once it is on its device, it must stay where it is."""
        trains = weight.requires_grad
        if self._weight is not weight or any(alias.requires_grad != trains for alias in self._aliases):
            self._weight = weight
            self._aliases = tuple(nn.Parameter(weight.data, requires_grad=trains) for _ in range(self.count))
        return self._aliases


@runtime_checkable
class UsedApart(Protocol):
    """A module with ``Uses`` of parameters of its own, by their names."""

    def uses_apart(self) -> dict[str, Uses]: ...


class _Divert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, uses: Uses) -> Any:
        ctx.uses = uses
        return tuple(weight.view_as(weight) for _ in range(uses.count))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        assert ctx.uses.taken is not None
        ctx.uses.taken(list(gradients))
        return None, None
