"""Sums in one order, whatever the number of ranks: an aligned binary tree over leaves that have an order.

Pairs of neighbours are added, then pairs of those sums, and so on; where their number is odd, the last is carried up
as it is. A run of neighbours whose length is a power of two, and which begins at a multiple of it, is a subtree: so it
does not matter which ranks hold which leaves, if each has such a run. Over an axis each rank is one leaf.

Long messages are shared out: every rank is sent its piece of each leaf, adds, and sends the sum to the others; as many
bytes as a ring's. They go in segments, so that the additions to one run beside the exchange of the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from argonne.parallel.communication import collectives
from argonne.parallel.communication.collectives import Pending
from argonne.parallel.communication.groups import Axis
from argonne.parallel.errors import ArgonneError

GATHERED_BYTES = 2**19
"""Of all leaves together: up to here every rank gathers them whole, which is one round less (docs/log.md)."""
PIECE_BYTES = 2**20
"""Of a segment on each rank: long for a message, and short enough to be added in the caches (docs/log.md)."""
_AHEAD = 2  # segments on their way where nothing else runs beside them: no more memory is taken


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of ``parts`` (one shape) in tree order; it overwrites them, and the result is the first.

    Raises:
        ArgonneError: there are no parts.
    """
    if not parts:
        raise ArgonneError("a sum of no parts has no shape; legal: 1 part or more")
    parts = list(parts)
    while len(parts) > 1:
        paired = len(parts) // 2 * 2
        pairs = zip(parts[:paired:2], parts[1:paired:2], strict=True)
        parts = [left.add_(right) for left, right in pairs] + parts[paired:]
    return parts[0]


class TreeSum:
    """``tree_sum`` of leaves that come one after the other: a binary counter of partial sums.

    Of n leaves at most log2(n) + 1 tensors are kept. What is added belongs to the sum, and is overwritten.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[int, Tensor]] = []  # of 2^level leaves each, the levels descending

    def add(self, leaf: Tensor) -> None:
        """Add the next leaf."""
        level = 0
        while self._sums and self._sums[-1][0] == level:
            leaf = self._sums.pop()[1].add_(leaf)
            level += 1
        self._sums.append((level, leaf))

    def clear(self) -> None:
        """Forget what was added."""
        self._sums.clear()

    def total(self) -> Tensor:
        """The sum of all leaves; the next leaf begins another.

        Raises:
            ArgonneError: no leaf was added.
        """
        if not self._sums:
            raise ArgonneError("a sum of no leaves has no shape; legal: total() after 1 add() or more")
        total = self._sums.pop()[1]
        while self._sums:
            total = self._sums.pop()[1].add_(total)
        return total


def start_tree_sum(tensor: Tensor, axis: Axis, site: str | None = None, *, wait: bool = False) -> Pending:
    """Begin to sum ``tensor`` over ``axis`` in tree order: the exchange is in flight, the wait makes the additions.

    The result is in ``tensor`` outside ``torch.compile``. All ranks must wait for several sums in one order.
    """
    if torch.compiler.is_compiling():
        return _start_in_graph(tensor, axis)
    # Written past the version counter: where versions tell what was added too late, this is not that.
    flat = tensor.data.flatten()  # a view where it can be
    shared_out = flat.numel() // axis.size * axis.size if axis.size * flat.nbytes > GATHERED_BYTES else 0
    gathering = None
    if shared_out < flat.numel():
        gathering = collectives.start_all_gather(flat[shared_out:].unsqueeze(0), axis, site, wait=wait)
    segments = _Segments(flat[:shared_out], axis, site)
    segments.exchange(_AHEAD if wait else None)

    def finish(tensor: Tensor) -> Tensor:
        segments.add()
        if gathering is not None:
            flat[shared_out:] = tree_sum(gathering.wait().unbind(0))
        if not tensor.is_contiguous():
            tensor.data.copy_(flat.view_as(tensor))
        return tensor

    return Pending(tensor, finish=finish)


def start_tree_sum_and_scatter(tensor: Tensor, axis: Axis, site: str | None = None, *, wait: bool = False) -> Pending:
    """Begin to sum ``tensor`` over ``axis`` in tree order, each rank keeping its equal part of dimension 0.

    Raises:
        ArgonneError: dimension 0 cannot be cut into equal parts.
    """
    collectives.require_equal_parts(tensor, axis)
    parts = tensor.unflatten(0, (axis.size, tensor.shape[0] // axis.size))
    pending = collectives.start_all_to_all(parts, axis, site, wait=wait)
    # A copy, lest the result keep the memory of all leaves.
    pending.finish = lambda leaves: tree_sum(leaves.unbind(0)).clone()
    return pending


class _Segments:
    """The segments of ``flat`` (contiguous, in equal parts for all ranks), each on its way through the tree."""

    def __init__(self, flat: Tensor, axis: Axis, site: str | None) -> None:
        self._axis, self._site = axis, site
        step = axis.size * (PIECE_BYTES // flat.element_size())
        self._waiting = deque(flat.split(step) if flat.numel() else ())
        self._exchanged: deque[tuple[Tensor, Pending]] = deque()

    def exchange(self, count: int | None) -> None:
        """Send every rank its piece of the next ``count`` segments, or of all."""
        for _ in range(len(self._waiting) if count is None else min(count, len(self._waiting))):
            segment = self._waiting.popleft()
            pieces = segment.view(self._axis.size, -1)
            self._exchanged.append((segment, collectives.start_all_to_all(pieces, self._axis, self._site)))

    def add(self) -> None:
        """Add this rank's pieces, and gather all ranks' sums where the segments were."""
        gathering = []
        while self._exchanged:
            segment, exchanged = self._exchanged.popleft()
            total = tree_sum(exchanged.wait().unbind(0))
            gathering.append(collectives.start_all_gather(total, self._axis, self._site, into=segment))
            self.exchange(1)
        for pending in gathering:
            pending.wait()


def _start_in_graph(tensor: Tensor, axis: Axis) -> Pending:
    """As nodes of a graph: whole, with zeros for what the ranks cannot share out."""
    count, shape = tensor.numel(), tensor.shape
    padded = torch.nn.functional.pad(tensor.flatten(), (0, -count % axis.size))
    pending = collectives.start_all_to_all(padded.view(axis.size, -1), axis)

    def finish(leaves: Tensor) -> Tensor:
        return collectives.start_all_gather(tree_sum(leaves.unbind(0)), axis).wait()[:count].view(shape)

    pending.finish = finish
    return pending
