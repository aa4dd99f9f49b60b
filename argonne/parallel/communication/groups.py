"""The processes that work together: made once, frozen, and handed to every constructor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from argonne.parallel.communication.layout import AXES, Layout, require_blocks
from argonne.parallel.errors import LayoutError

Summation = Literal["fast", "tree"]
"""How numbers of several ranks are added. ``fast``: in whatever order the library of collectives takes. ``tree``: in
one aligned binary tree over the ranks in their order, the same for every element (``tree.py``)."""


class SmallExchanges(Protocol):
    """What exchanges tensors that are small enough, faster than a collective."""

    capacity: int
    """Bytes of the largest."""

    def fits(self, tensor: Tensor) -> bool:
        """Whether it is for this one."""

    def sum(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with the sum over the ranks, the same on all of them."""

    def sum_array(self, array: NDArray[Any]) -> None:
        """``sum`` of what is in NumPy."""
        ...

    def gather(self, tensor: Tensor, into: Tensor) -> None:
        """Fill ``into`` with every rank's ``tensor``, in rank order."""

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite ``tensor`` with that of rank ``source``."""


class Waited(Protocol):
    """What has been begun."""

    def wait(self) -> object:
        """Until it is done."""
        ...


class Exchanges(Protocol):
    """What exchanges tensors of any length faster than a collective, and lets other work run beside."""

    def sum(self, tensor: Tensor) -> Waited:
        """Begin to overwrite ``tensor`` with the sum over the ranks, the same on all of them."""
        ...

    def sum_and_scatter(self, tensor: Tensor, into: Tensor) -> Waited:
        """Begin to fill ``into`` with this rank's equal part of the sum of ``tensor`` over the ranks."""
        ...

    def gather(self, tensor: Tensor, into: Tensor) -> Waited:
        """Begin to fill ``into`` with every rank's ``tensor``, in rank order."""
        ...


@dataclass(frozen=True)
class Axis:
    """One process's view of the processes it works with along one axis of the layout."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    """``None`` when the axis has one process: every collective over it is then skipped."""
    ranks: tuple[int, ...] = (0,)
    """The global rank of each member."""
    summation: Summation = "fast"
    """In what order ``reduction.py`` adds what the members have."""
    blocks: int | None = None
    """Canonical blocks of the whole axis, where its sums are trees; None: as many as ranks."""
    shared: SmallExchanges | None = None
    """How members that share memory exchange what is small (``shared_memory.py``); None: as all else."""
    sums: Exchanges | None = None
    """How members that share memory add and gather (``shared_sums.py``); None: in collectives."""

    @property
    def own_blocks(self) -> int:
        """Canonical blocks of this rank: neighbours, which are a subtree of the axis's sums."""
        return 1 if self.blocks is None else self.blocks // self.size


JOINT_AXES = {
    "replicas": ("data", "context"),
    "stage": ("data", "context", "tensor"),
    "model": ("pipeline", "context", "tensor"),
}
"""Axes taken together, under the names that ``ProcessGroups`` gives them."""


@dataclass(frozen=True)
class ProcessGroups:
    """Every axis of a layout as this process sees it. Nothing else knows which rank it is."""

    layout: Layout
    device: torch.device
    world: Axis
    tensor: Axis
    pipeline: Axis
    data: Axis
    context: Axis
    replicas: Axis
    """Data and context together: the ranks of the same part of the model, over which gradients are partial sums."""
    stage: Axis
    """Data, context and tensor together: all the ranks of one pipeline stage."""
    model: Axis
    """Pipeline, context and tensor together: the ranks that one batch of samples is for."""
    mesh: DeviceMesh | None = None
    """The axes of ``AXES`` and the joint ones, for PyTorch's own parallel tools; None for a lone process."""

    @classmethod
    def single(cls, device: torch.device | str = "cpu", layout: Layout | None = None) -> ProcessGroups:
        """The groups of a lone process: no launcher and no ``torch.distributed`` needed.

        ``layout``, of one process, is kept as it is: what it asks for besides has no effect here, but is recorded.
        """
        layout = layout or Layout()
        layout.require_world_size(1)
        axes: dict[str, Any] = {axis: Axis(axis) for axis in (*AXES, *JOINT_AXES)}
        return cls(layout, torch.device(device), Axis("world"), **axes)

    @classmethod
    def of_rank(cls, layout: Layout, rank: int, device: torch.device | str = "meta") -> ProcessGroups:
        """What ``rank`` of a job would see, without the job: to build a model and count, not to run it."""
        place = dict(zip(AXES, layout.coordinates(rank), strict=True))
        sizes = dict(zip(AXES, layout.sizes, strict=True))
        for name, parts in (("world", AXES), *JOINT_AXES.items()):
            extents = [sizes[part] for part in parts]
            sizes[name], place[name] = math.prod(extents), int(np.ravel_multi_index([place[p] for p in parts], extents))
        axes: dict[str, Any] = {name: Axis(name, sizes[name], place[name]) for name in sizes}
        return cls(layout, torch.device(device), **axes)

    @classmethod
    def from_world(cls, layout: Layout, device: torch.device | str) -> ProcessGroups:
        """Arrange the initialised default process group by ``layout`` (collective over all its ranks).

        Raises:
            LayoutError: the number of processes is not what the layout needs.
        """
        world_size = dist.get_world_size()
        layout.require_world_size(world_size)
        device = torch.device(device)
        rank = dist.get_rank()
        if world_size == 1:
            return cls.single(device, layout)
        world = Axis("world", world_size, rank, dist.group.WORLD, tuple(range(world_size)))
        mesh = init_device_mesh(device.type, layout.sizes, mesh_dim_names=AXES)
        axes: dict[str, Any] = {axis: _axis(axis, mesh[axis]) for axis in AXES}
        for name, parts in JOINT_AXES.items():
            axes[name] = _joint(mesh, name, [axes[part] for part in parts], world)
        return cls(layout, device, world, mesh=mesh, **axes)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints, and writes what is written once."""
        return self.world.rank == 0

    @property
    def sequence_parallel(self) -> bool:
        """Whether the tensor-parallel ranks share out the tokens between their layers."""
        return self.layout.sequence_parallel and self.tensor.size > 1

    def without_sequence_parallel(self) -> ProcessGroups:
        """The same processes, for layers whose ranks all have all tokens: heads and patches outside the blocks."""
        return replace(self, layout=replace(self.layout, sequence_parallel=False))

    @property
    def reproducible(self) -> bool:
        """Whether every sum is made in an order that does not depend on the layout."""
        return self.tensor.summation == "tree"

    def in_blocks(self, blocks: int) -> ProcessGroups:
        """The same processes, whose sums are trees and whose tensor axis has ``blocks`` canonical blocks.

        Raises:
            LayoutError: the tensor-parallel ranks cannot each have a subtree of so many blocks.
        """
        require_blocks(blocks, self.layout.tensor)
        if self.layout.context > 1:
            raise LayoutError(
                f"context_parallel={self.layout.context} is not reproducible: it sums the gradients of keys and values "
                "in an order of its own; legal: 1"
            )
        names = ("world", *AXES, *JOINT_AXES)
        axes: dict[str, Any] = {name: replace(getattr(self, name), summation="tree") for name in names}
        axes["tensor"] = replace(axes["tensor"], blocks=blocks)
        return replace(self, **axes)

    @property
    def coordinates(self) -> dict[str, int]:
        """This process's rank along each axis."""
        return {axis: getattr(self, axis).rank for axis in AXES}

    def set_timeout(self, timeout: timedelta) -> None:
        """Give every later collective ``timeout`` before it counts as a lost peer."""
        axes = [self.world, *(getattr(self, axis) for axis in (*AXES, *JOINT_AXES))]
        for group in {id(axis.group): axis.group for axis in axes if axis.group is not None}.values():
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def _axis(name: str, line: DeviceMesh) -> Axis:
    if line.size() == 1:
        return Axis(name, ranks=(dist.get_rank(),))
    group = line.get_group()
    return Axis(name, line.size(), line.get_local_rank(), group, tuple(dist.get_process_group_ranks(group)))


def _joint(mesh: DeviceMesh, name: str, parts: list[Axis], world: Axis) -> Axis:
    """The axes ``parts`` as one, the last varying fastest; without a group of its own where one fits."""
    size = math.prod(part.size for part in parts)
    longest = max(parts, key=lambda part: part.size)
    if size == longest.size:
        return replace(longest, name=name)
    if size == world.size:
        return replace(world, name=name)
    return _axis(name, mesh[tuple(part.name for part in parts)]._flatten(name))
