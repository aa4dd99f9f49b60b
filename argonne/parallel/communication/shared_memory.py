"""Sums of a few kilobytes between processes of one machine, through memory that they share.

Gloo takes 300 microseconds and more for the sum of one token's hidden values (``benchmarks/tp_allreduce.py``), and a
generated token needs two for each layer: they would take as long as the layer's products. Here a rank writes its part
where all can read it, waits until the others have, and adds the parts in the order of the ranks: all get the same sum.

It waits in a loop, which is right where the others are about to come, as in generation; training does not use this.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from argonne.parallel.communication.collectives import gather_objects
from argonne.parallel.communication.groups import Axis, ProcessGroups

CAPACITY = 1 << 16
"""Bytes of the largest tensor that is summed here; above, the time of a collective is that of its bytes."""
_LINE = 64  # bytes of a cache line: no two ranks write to the same
_FOLDER = Path("/dev/shm")
_SPINS = 4000  # some hundred microseconds; afterwards whoever else wants the processor has it
_PATIENCE = 600.0  # seconds


class SharedSums:
    """The memory that the ranks of an axis share, and where in it each of them is.

    A rank may write the parts of one sum while another still reads those of the one before, and no further ahead: the
    parts of successive sums take turns in two places.
    """

    def __init__(self, memory: mmap.mmap, ranks: int, rank: int) -> None:
        self._ranks, self._rank, self._count = ranks, rank, 0
        # Of each rank, the number of the last sum whose part it has written.
        self._written = np.frombuffer(memory, np.int64, ranks * _LINE // 8)[:: _LINE // 8]
        self._parts = torch.frombuffer(memory, dtype=torch.uint8, offset=ranks * _LINE).view(2, ranks, CAPACITY)
        self._views: dict[tuple[torch.dtype, int, int], list[Tensor]] = {}

    @staticmethod
    def bytes(ranks: int) -> int:
        """Of the memory."""
        return ranks * (_LINE + 2 * CAPACITY)

    def fits(self, tensor: Tensor) -> bool:
        return tensor.nbytes <= CAPACITY and tensor.is_contiguous()

    def sum(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with the sum over the ranks; all of them call this, in the same order."""
        self._count += 1
        key = (tensor.dtype, tensor.numel(), self._count % 2)
        if (parts := self._views.get(key)) is None:
            parts = [part[: tensor.nbytes].view(tensor.dtype) for part in self._parts[key[2]]]
            self._views[key] = parts
        flat = tensor.view(-1)
        parts[self._rank].copy_(flat)
        self._written[self._rank] = self._count
        for other in range(self._ranks):
            if self._written[other] < self._count:
                self._wait(other)
        torch.add(parts[0], parts[1], out=flat)
        for part in parts[2:]:
            flat.add_(part)

    def _wait(self, other: int) -> None:
        written, count = self._written, self._count
        for _ in range(_SPINS):
            if written[other] >= count:
                return
        deadline = time.monotonic() + _PATIENCE
        while written[other] < count:
            os.sched_yield()
            if time.monotonic() > deadline:
                raise RuntimeError(f"a sum in shared memory timed out: rank {other} has not written its part")


def sharing_memory(groups: ProcessGroups) -> ProcessGroups:
    """The same processes, which on one machine make small sums over the tensor axis in memory (collective)."""
    if groups.device.type != "cpu" or groups.reproducible:
        return groups
    return replace(groups, tensor=replace(groups.tensor, shared=share_memory(groups.tensor)))


def share_memory(axis: Axis) -> SharedSums | None:
    """Memory for the sums of an axis, where its ranks can have it; else None on all of them (collective)."""
    # Elsewhere the processor may show a rank's number to others before its part.
    able = platform.machine() in ("x86_64", "AMD64") and _FOLDER.is_dir() and hasattr(os, "sched_yield")
    if axis.group is None or not all(gather_objects(able, axis)):
        return None
    size = SharedSums.bytes(axis.size)
    name = None
    if axis.rank == 0:
        with contextlib.suppress(OSError):
            descriptor, name = tempfile.mkstemp(prefix="argonne-", dir=_FOLDER)
            os.posix_fallocate(descriptor, 0, size)
            os.close(descriptor)
    name = gather_objects(name, axis)[0]
    memory = None
    if name is not None:
        with contextlib.suppress(OSError, ValueError), open(name, "r+b") as file:
            memory = mmap.mmap(file.fileno(), size)
    found = gather_objects(memory is not None, axis)
    if axis.rank == 0 and name is not None:
        os.unlink(name)  # the memory stays as long as somebody has it
    return SharedSums(memory, axis.size, axis.rank) if memory is not None and all(found) else None
