"""Sums and gatherings of a few kilobytes between processes of one machine, through memory that they share.

Gloo takes 300 microseconds and more for the sum of one token's hidden values (``benchmarks/tp_allreduce.py``), and a
generated token needs two for each layer: they would take as long as the layer's products. Here a rank writes its part
where all can read it, waits until the others have, and reads theirs. Sums are in the order of the ranks, so that all
get the same.

It waits in a loop, which is right where the others are about to come, as in generation; training has
``shared_sums.py``.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import select
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from argonne.parallel.communication.collectives import gather_objects
from argonne.parallel.communication.groups import Axis, ProcessGroups

CAPACITY = 1 << 16
"""Bytes of the largest tensor that is exchanged here; above, the time of a collective is that of its bytes."""
_LINE = 64  # bytes of a cache line: no two ranks write to the same
_FOLDER = Path("/dev/shm")
_SPINS = 4000  # some hundred microseconds; afterwards whoever else wants the processor has it
_YIELDS = 0.05  # seconds; afterwards nobody is about to come, and the processor is left alone between two looks
_LOOKS_EVERY = 0.001  # seconds
_PATIENCE = 600.0  # seconds


class SharedMemory:
    """The memory that the ranks of an axis share, and where in it each of them is.

    A rank may write its part of one exchange while another still reads those of the one before, and no further ahead:
    the parts of successive exchanges take turns in two places.
    """

    capacity = CAPACITY

    def __init__(self, memory: mmap.mmap, axis: Axis, processes: Sequence[int]) -> None:
        """``processes`` are a descriptor of each rank's (``os.pidfd_open``)."""
        ranks = axis.size
        self._rank, self._count, self._processes, self._names = axis.rank, 0, processes, axis.ranks
        self._others = [other for other in range(ranks) if other != axis.rank]
        self._spins = _SPINS if ranks <= len(os.sched_getaffinity(0)) else 0
        # Of each rank, the number of the last exchange whose part it has written.
        self._written = np.frombuffer(memory, np.int64, ranks * _LINE // 8)[:: _LINE // 8]
        self._places = np.frombuffer(memory, np.uint8, offset=ranks * _LINE).reshape(2, ranks, CAPACITY)
        self._views: dict[tuple[np.dtype[Any], int, int], list[NDArray[Any]]] = {}

    @staticmethod
    def bytes(ranks: int) -> int:
        """Of the memory."""
        return ranks * (_LINE + 2 * CAPACITY)

    def fits(self, tensor: Tensor) -> bool:
        return tensor.nbytes <= CAPACITY and tensor.is_contiguous()

    def sum(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with the sum over the ranks; all of them call this and the others in the same order."""
        if tensor.dtype != torch.bfloat16:
            return self.sum_array(tensor.numpy())
        first, *others = (torch.from_numpy(part).view(tensor.dtype) for part in self._parts(_bits(tensor)))
        flat = tensor.view(-1).copy_(first)
        for part in others:
            flat.add_(part)

    def sum_array(self, array: NDArray[Any]) -> None:
        """``sum`` of what NumPy has, which computes so little sooner."""
        flat = array.reshape(-1)
        first, second, *others = self._parts(flat)
        np.add(first, second, out=flat)
        for part in others:
            np.add(flat, part, out=flat)

    def gather(self, tensor: Tensor, into: Tensor) -> None:
        """Fill ``into`` with every rank's ``tensor``, one after the other."""
        np.concatenate(self._parts(_bits(tensor)), out=_bits(into))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite ``tensor`` with that of rank ``source``."""
        flat = _bits(tensor)
        flat[:] = self._parts(flat)[source]

    def _parts(self, flat: NDArray[Any]) -> list[NDArray[Any]]:
        """What every rank has handed in, ``flat`` among them: to be read before the exchange after the next one."""
        self._count = count = self._count + 1
        key = (flat.dtype, flat.size, count % 2)
        if (parts := self._views.get(key)) is None:
            parts = [place[: flat.nbytes].view(flat.dtype) for place in self._places[count % 2]]
            self._views[key] = parts
        parts[self._rank][:] = flat
        self._written[self._rank] = count
        for other in self._others:
            if self._written[other] < count:
                self._wait(other)
        return parts

    def _wait(self, other: int) -> None:
        written, count = self._written, self._count
        for _ in range(self._spins):
            if written[other] >= count:
                return
        began = time.monotonic()
        while written[other] < count:
            waited = time.monotonic() - began
            if waited < _YIELDS:
                os.sched_yield()
                continue
            time.sleep(_LOOKS_EVERY)
            # In this order: a rank that has ended and has not written its part never will.
            ended = has_ended(self._processes[other])
            if (ended or waited > _PATIENCE) and written[other] < count:
                how = "has ended" if ended else f"has not come within {_PATIENCE:g} s"
                raise dist.DistError(f"rank {self._names[other]} {how}")


def _bits(tensor: Tensor) -> NDArray[Any]:
    """The elements of a contiguous tensor; of bfloat16, which NumPy does not have, as integers."""
    flat = tensor.view(-1)
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()


def has_ended(process: int) -> bool:
    """Whether the process of that descriptor has."""
    looks = select.poll()
    looks.register(process, select.POLLIN)
    return bool(looks.poll(0))


def sharing_memory(groups: ProcessGroups) -> ProcessGroups:
    """The same processes, which on one machine exchange what is small over the tensor axis in memory (collective).

    So do all, where these are all.
    """
    if groups.device.type != "cpu" or groups.reproducible:
        return groups
    shared = share_memory(groups.tensor)
    world = groups.world
    if world.ranks == groups.tensor.ranks:
        world = replace(world, shared=shared)
    return replace(groups, tensor=replace(groups.tensor, shared=shared), world=world)


def share_memory(axis: Axis) -> SharedMemory | None:
    """Memory for the exchanges of an axis, where its ranks can have it; else None on all of them (collective)."""
    found = map_together(axis, SharedMemory.bytes(axis.size))
    return None if found is None else SharedMemory(found[0], axis, found[1])


def map_together(axis: Axis, size: int) -> tuple[mmap.mmap, list[int]] | None:
    """``size`` bytes that the ranks of an axis share, zeros at first, and a descriptor of each of their processes.

    None on all of them where one cannot have it (collective).
    """
    if axis.group is None or "" in (found := set(gather_objects(_numbering(), axis))) or len(found) > 1:
        return None
    name = None
    if axis.rank == 0:
        with contextlib.suppress(OSError):
            descriptor, name = tempfile.mkstemp(prefix="argonne-", dir=_FOLDER)
            os.posix_fallocate(descriptor, 0, size)
            os.close(descriptor)
    shown = gather_objects((name, os.getpid()), axis)
    name = shown[0][0]
    memory, processes = None, []
    if name is not None:
        with contextlib.suppress(OSError, ValueError), open(name, "r+b") as file:
            processes = [os.pidfd_open(process) for _, process in shown]
            memory = mmap.mmap(file.fileno(), size)
    all_have = all(gather_objects(memory is not None, axis))
    if axis.rank == 0 and name is not None:
        os.unlink(name)  # the memory stays as long as somebody has it
    return (memory, processes) if memory is not None and all_have else None


def _numbering() -> str:
    """By what numbers processes know each other here: only where they are the same can one see another end.

    Empty where there is no memory to share, or where a processor may show a rank's number to others before its part.
    """
    if platform.machine() in ("x86_64", "AMD64") and _FOLDER.is_dir() and hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            return os.readlink("/proc/self/ns/pid")
    return ""
