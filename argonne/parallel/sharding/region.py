"""A box of a whole tensor, and who holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from argonne.parallel.communication.groups import Axis, ProcessGroups
from argonne.parallel.sharding.initialisation import Initialiser


@dataclass(frozen=True)
class Holders:
    """Who holds a region along one axis, and what they know of its gradient."""

    ranks: tuple[int, ...]
    """Their ranks of the axis; the first owns the region along it."""
    partial: bool
    """Each has only a part of the gradient: the parts are summed over the holders."""

    @property
    def owner(self) -> int:
        """The one that counts the region in a norm and saves it."""
        return self.ranks[0]


@dataclass(frozen=True)
class Region:
    """A box of one whole tensor: ``parameter[local_index] == whole[whole_index]``.

    Regions that two ranks hold of the same whole tensor are either identical or disjoint, but for rows that replicas
    share out (ZeRO, FSDP) of a region with several tensor-parallel holders, each of which cuts rows of its own.

    Along each of three axes a region has holders. What is declared is short, because most regions say nothing of most
    axes; what is asked is one question for all of them, ``holders_over(axis)``, and it is the only one that the sums of
    gradients, the norm, saving and ``check_declarations`` ask. A new way of sharing out (experts, shards within groups
    of replicas) is then a new answer, and no new question.
    """

    name: str
    """The whole tensor. A layer gives it relative to itself (``weight``, or ``../q_proj.weight`` for a
    tensor named after a sibling); ``sharded_parameters`` makes it absolute."""
    whole_shape: tuple[int, ...]
    start: tuple[int, ...]
    """The first index of the box in the whole tensor, for each dimension."""
    shape: tuple[int, ...]
    """That of the box in the whole tensor."""
    local_start: tuple[int, ...]
    """The first index of the box in the parameter; the rest of the parameter is padding, kept at zero."""
    holders: tuple[int, ...]
    """Along ``tensor``: the ranks with this same region."""
    partial_gradient: bool = False
    """Whether those each have only a part of its gradient. The same on every rank for all regions of a whole tensor,
    also for those with one holder."""
    stages: tuple[int, ...] = ()
    """Along ``pipeline``: the ranks with this same region (a tied embedding), each with a part of its gradient; empty:
    this one alone."""
    replicas: tuple[int, ...] = ()
    """Along ``replicas``: the ranks with this same region, each with a part of its gradient (ZeRO and FSDP share out
    rows); empty: all of them."""
    transposed: bool = False
    """The parameter has the dimensions of the whole tensor in reverse order (the ``Conv1D`` of GPT-2 saves its weights
    as ``[in, out]``). ``local_start`` is in the parameter's order, ``start`` and both shapes are in the whole tensor's.
    """

    @classmethod
    def slab(
        cls,
        name: str,
        whole_shape: Sequence[int],
        dim: int,
        held: range,
        holders: tuple[int, ...],
        local_start: int = 0,
        partial_gradient: bool = False,
    ) -> Region:
        """The indices ``held`` of dimension ``dim``, and all of the others."""
        begin, end, zeros = tuple(whole_shape[:dim]), tuple(whole_shape[dim + 1 :]), [0] * len(whole_shape)
        start, local = ((*zeros[:dim], first, *zeros[dim + 1 :]) for first in (held.start, local_start))
        return cls(name, tuple(whole_shape), start, (*begin, len(held), *end), local, holders, partial_gradient)

    def holders_over(self, axis: Axis) -> Holders:
        """Who holds the region along ``axis``, which is ``groups.tensor``, ``.pipeline`` or ``.replicas``."""
        if axis.name == "tensor":
            return Holders(self.holders, self.partial_gradient)
        if axis.name == "pipeline":
            return Holders(self.stages or (axis.rank,), bool(self.stages))
        assert axis.name == "replicas", axis.name
        return Holders(self.replicas or tuple(range(axis.size)), True)

    def is_owner(self, groups: ProcessGroups) -> bool:
        """Whether this rank counts the region in a norm and saves it: true on one rank of the job."""
        return all(self.is_owner_over(axis) for axis in holding_axes(groups))

    def is_owner_over(self, axis: Axis) -> bool:
        """Whether this rank is the first holder along ``axis``."""
        return self.holders_over(axis).owner == axis.rank

    @property
    def whole_index(self) -> tuple[slice, ...]:
        """Where the box lies in the whole tensor."""
        return _box(self.start, self.shape)

    @property
    def local_index(self) -> tuple[slice, ...]:
        """Where the box lies in the parameter."""
        return _box(self.local_start, self.shape[::-1] if self.transposed else self.shape)

    def part_of(self, tensor: Tensor) -> Tensor:
        """The box in the parameter, or in what has its shape, with the dimensions of the whole tensor (a view)."""
        part = tensor[self.local_index]
        return part.permute(*reversed(range(part.ndim))) if self.transposed else part


@dataclass(frozen=True)
class ShardSpec:
    """What one parameter holds, and how it begins."""

    regions: tuple[Region, ...]
    initialiser: Initialiser | None = None
    """``None``: the module has initialised the parameter itself."""
    is_table: bool = False
    """Rows are looked up or scored one by one (tokens, positions): no matrix that maps vectors, even with two
    dimensions."""


def holding_axes(groups: ProcessGroups) -> tuple[Axis, Axis, Axis]:
    """The axes along which a region has holders. A rank's places on them tell it from every other of the job."""
    return groups.tensor, groups.pipeline, groups.replicas


def _box(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + extent) for first, extent in zip(start, shape, strict=True))
