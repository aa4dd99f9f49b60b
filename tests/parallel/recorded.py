"""What tests of ``record`` look with: where collectives are, a block that makes some, and products within a span."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from argonne.parallel import Collective, ColumnParallelLinear, Precision, ProcessGroups, RowParallelLinear

Place = tuple[str, str, str]  # module, phase, op


def places(collectives: list[Collective]) -> list[Place]:
    return [(c.module, c.phase, c.op) for c in collectives]


class FeedForward(nn.Module):
    def __init__(self, groups: ProcessGroups, precision: Precision = Precision()) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(4, 8, groups, precision=precision)
        self.down = RowParallelLinear(8, 4, groups, precision=precision)
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "_linear_pointwise"}  # the last is oneDNN's


class ProductStarts(TorchDispatchMode):
    """When each matrix product began, with the shape of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        began = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS:
            self.seen.append((tuple(result.shape), began))
        return result

    def within(self, entry: Collective) -> list[tuple[int, ...]]:
        """The shapes of the products that began while ``entry`` was in flight."""
        return [shape for shape, began in self.seen if entry.started < began < entry.finished]
