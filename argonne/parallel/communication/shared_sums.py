"""Sums and gatherings of any length between processes of one machine, through memory that they share.

Gloo sends what ranks of one machine have through the kernel, and has a thread to do it: a sum of 2 MiB takes it two and
a half times the processor time that it takes here (docs/log.md). A rank copies its part to where all can read it, a
mebibyte at a time, so that it is still in a cache when the others add it up. Each adds the parts of all, in the order
of the ranks, so that all get the same.

What has been begun is handed in at once, as far as there is room for it, and added up by whoever waits for it. A rank
that waits looks for a moment, and then sleeps until another wakes it: where there are more ranks than cores, it only
sleeps.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from argonne.parallel.communication.environment import this_process
from argonne.parallel.communication.groups import Axis, ProcessGroups
from argonne.parallel.communication.shared_memory import has_ended, map_together

CHUNK = 1 << 20
"""Bytes that are handed in at a time."""
PLACES = 4
"""Chunks of each rank that the others may not have read yet."""
_LINE = 64  # bytes of a cache line: no two ranks write to the same
_HANDED_IN, _READ = 0, 1  # of each rank, how many chunks
_SPINS = 2000  # some hundred microseconds
_LOOKS_EVERY = 0.05  # seconds, for ranks that have ended
_PATIENCE = 600.0  # seconds
_FUTEX, _WAIT, _WAKE, _ALL = 202, 0, 1, 2**31 - 1  # of Linux on x86-64, the only one whose ranks share memory

_Take = Callable[[Sequence[Tensor], int, int], None]
"""Given each rank's part of the elements from one to another, makes what is wanted of them."""


@dataclass
class _Exchange:
    """One sum or gathering: what this rank hands in, and how far it is."""

    memory: SharedSums
    flat: Tensor
    take: _Take
    handed_in: int = 0
    taken: int = 0

    def wait(self) -> None:
        """Until it is done, and all that were begun before it."""
        self.memory.finish(self)


class SharedSums:
    """The memory that the ranks of an axis share, and how far in it each of them is.

    All of them begin and wait for the same exchanges in the same order.
    """

    def __init__(self, memory: mmap.mmap, axis: Axis, processes: Sequence[int], spins: int = _SPINS) -> None:
        """``processes`` are a descriptor of each rank's (``os.pidfd_open``)."""
        ranks = axis.size
        self._axis, self._processes, self._spins = axis, processes, spins
        self._others = [other for other in range(ranks) if other != axis.rank]
        lines = np.frombuffer(memory, np.int64, 2 * ranks * _LINE // 8)
        self._address = lines.ctypes.data
        self._counts = lines[:: _LINE // 8]
        offset = 2 * ranks * _LINE
        self._places = torch.frombuffer(memory, dtype=torch.uint8, offset=offset).view(PLACES, ranks, CHUNK)
        self._handed_in = self._read = 0
        self._begun: deque[_Exchange] = deque()

    @staticmethod
    def bytes(ranks: int) -> int:
        """Of the memory."""
        return ranks * (2 * _LINE + PLACES * CHUNK)

    def sum(self, tensor: Tensor) -> _Exchange:
        """Begin to overwrite ``tensor`` (contiguous) with the sum over the ranks."""
        flat = tensor.view(-1)
        return self._begin(flat, lambda parts, start, stop: _add(parts, flat[start:stop]))

    def sum_and_scatter(self, tensor: Tensor, into: Tensor) -> _Exchange:
        """Begin to fill ``into`` with this rank's equal part of the sum of ``tensor`` (contiguous) over the ranks."""
        result = into.view(-1)
        first = self._axis.rank * result.numel()

        def take(parts: Sequence[Tensor], start: int, stop: int) -> None:
            low, high = max(start, first), min(stop, first + result.numel())
            if low < high:
                _add([part[low - start : high - start] for part in parts], result[low - first : high - first])

        return self._begin(tensor.view(-1), take)

    def gather(self, tensor: Tensor, into: Tensor) -> _Exchange:
        """Begin to fill ``into`` with every rank's ``tensor`` (both contiguous), one after the other."""
        joined = into.view(self._axis.size, -1)

        def take(parts: Sequence[Tensor], start: int, stop: int) -> None:
            for row, part in zip(joined, parts, strict=True):
                row[start:stop].copy_(part)

        return self._begin(tensor.view(-1), take)

    @torch.no_grad()
    def finish(self, exchange: _Exchange) -> None:
        """Wait until ``exchange`` is done, and all that were begun before it."""
        while exchange.taken < exchange.flat.numel():
            first = self._begun[0]
            while first.taken < first.flat.numel():
                self._hand_in(first)
                self._take(first)
            self._begun.popleft()

    @torch.no_grad()
    def _begin(self, flat: Tensor, take: _Take) -> _Exchange:
        if self._begun and self._begun[-1].handed_in < self._begun[-1].flat.numel():
            self.finish(self._begun[-1])  # chunks are in the order of exchanges
        exchange = _Exchange(self, flat, take)
        if flat.numel():
            self._begun.append(exchange)
            self._hand_in(exchange)
        return exchange

    def _hand_in(self, exchange: _Exchange) -> None:
        """As many chunks of it as there is room for."""
        while exchange.handed_in < exchange.flat.numel() and self._handed_in - self._read < PLACES:
            start, stop = _next(exchange.flat, exchange.handed_in)
            for other in self._others:  # the place is free when all have read what was there
                self._await(other, _READ, self._handed_in + 1 - PLACES)
            self._parts(self._handed_in, exchange.flat, stop - start)[self._axis.rank].copy_(exchange.flat[start:stop])
            exchange.handed_in = stop
            self._handed_in += 1
            self._tell(_HANDED_IN, self._handed_in)

    def _take(self, exchange: _Exchange) -> None:
        """The next chunk of it."""
        start, stop = _next(exchange.flat, exchange.taken)
        for other in self._others:
            self._await(other, _HANDED_IN, self._read + 1)
        exchange.take(self._parts(self._read, exchange.flat, stop - start), start, stop)
        exchange.taken = stop
        self._read += 1
        self._tell(_READ, self._read)

    def _parts(self, chunk: int, flat: Tensor, elements: int) -> list[Tensor]:
        return [place[: elements * flat.itemsize].view(flat.dtype) for place in self._places[chunk % PLACES]]

    def _tell(self, kind: int, count: int) -> None:
        place = 2 * self._axis.rank + kind
        self._counts[place] = count
        _futex(_FUTEX, self._address + place * _LINE, _WAKE, _ALL, None, None, 0)

    def _await(self, other: int, kind: int, count: int) -> None:
        """Until the rank ``other`` has done ``count`` chunks of the kind."""
        counts, place = self._counts, 2 * other + kind
        if counts[place] >= count:
            return
        for _ in range(self._spins):
            if counts[place] >= count:
                return
        began = time.monotonic()
        while (seen := int(counts[place])) < count:
            low = seen & 0xFFFFFFFF  # futexes are of 32 bits, the lower of these
            _futex(_FUTEX, self._address + place * _LINE, _WAIT, low, _A_MOMENT, None, 0)
            if counts[place] >= count:
                return
            # In this order: a rank that has ended and has not come never will.
            ended, waited = has_ended(self._processes[other]), time.monotonic() - began
            if (ended or waited > _PATIENCE) and counts[place] < count:
                how = "has ended" if ended else f"has not come within {_PATIENCE:g} s"
                raise dist.DistError(f"rank {self._axis.ranks[other]} {how}")


def sharing_sums(groups: ProcessGroups) -> ProcessGroups:
    """The same processes, which on one machine exchange over the tensor axis in shared memory (collective)."""
    if groups.device.type != "cpu":
        return groups
    return replace(groups, tensor=replace(groups.tensor, sums=share_sums(groups.tensor)))


def share_sums(axis: Axis) -> SharedSums | None:
    """Memory for the sums of an axis, where its ranks can have it; else None on all of them (collective)."""
    if (found := map_together(axis, SharedSums.bytes(axis.size))) is None:
        return None
    here = max(axis.size, this_process().local_world_size)
    memory, processes = found
    return SharedSums(memory, axis, processes, spins=_SPINS if here <= len(os.sched_getaffinity(0)) else 0)


def _next(flat: Tensor, start: int) -> tuple[int, int]:
    return start, min(start + CHUNK // flat.itemsize, flat.numel())


def _add(parts: Sequence[Tensor], total: Tensor) -> None:
    first, second, *others = parts
    torch.add(first, second, out=total)
    for part in others:
        total.add_(part)


_A_MOMENT = ctypes.byref((ctypes.c_long * 2)(0, int(_LOOKS_EVERY * 1e9)))
_futex = ctypes.CDLL(None).syscall
