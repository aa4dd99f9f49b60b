"""How the tensor-parallel ranks hold an activation, and which parts of whole ones a rank has of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from argonne.parallel.communication.groups import Axis
from argonne.parallel.sharding.partition import Partition


@dataclass(frozen=True)
class HeldPart:
    """Some columns of one whole activation ``[rows, features]``."""

    name: str
    """As ``Partition.name``."""
    values: Tensor
    """``[rows, columns]``"""
    first_column: int
    features: int
    """Columns of the whole activation."""
    holders: tuple[int, ...]
    """The ranks that have the same part."""
    is_shared: bool
    """Whether some part of the whole activation has several holders that use it in their own way: each then has a part
    of its gradient."""


@dataclass(frozen=True)
class Placement:
    """How an activation ``[tokens, ..., features]`` is shared out over the tensor axis."""

    parts: tuple[Partition, ...] = ()
    """What the last dimension is, one whole activation after the other; empty: every rank has all features of one."""
    shares_tokens: bool = False
    """Dimension 0 is this rank's share, in the order of the ranks."""

    def held(self, x: Tensor, axis: Axis) -> Iterator[HeldPart]:
        """The parts of whole activations that this rank has in ``x``."""
        rows = x.reshape(-1, x.shape[-1])
        if not self.parts:
            holders = (axis.rank,) if self.shares_tokens else tuple(range(axis.size))
            yield HeldPart("", rows, 0, rows.shape[1], holders, False)
        local = 0
        for part in self.parts:
            for holders, whole, own in part.runs(axis.rank):
                values = rows[:, local + own.start : local + own.stop]
                yield HeldPart(part.name, values, whole.start, part.features, holders, part.is_shared)
            local += part.local_features(axis.rank)


@runtime_checkable
class PlacesOutput(Protocol):
    """A module that says how its output (each tensor of it, if it is a tuple) is held."""

    def output_placement(self) -> Placement: ...


@runtime_checkable
class PlacesInput(Protocol):
    """A module that says how its first input is held."""

    def input_placement(self) -> Placement: ...
