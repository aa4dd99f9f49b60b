"""Sums in one order, whatever the number of ranks: an aligned binary tree over leaves that have an order.

Pairs of neighbours are added, then pairs of those sums, and so on; where their number is odd, the last is carried up
as it is. A run of neighbours whose length is a power of two, and which begins at a multiple of it, is a subtree: so it
does not matter which ranks hold which leaves, if each has such a run. Over an axis each rank is one leaf.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from argonne.parallel.communication.collectives import Pending, require_equal_parts, start_all_gather
from argonne.parallel.communication.groups import Axis
from argonne.parallel.errors import ArgonneError


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
    """Begin to sum ``tensor`` (contiguous) over ``axis`` in tree order; as ``collectives.start_all_reduce``.

    The result is in ``tensor`` outside ``torch.compile``.
    """
    if axis.group is None:
        return Pending(tensor)
    pending = start_all_gather(tensor.unsqueeze(0), axis, site, wait=wait)
    # Where a version is compared to find what comes too late, the sum itself is not too late.
    result = tensor if pending.in_graph else tensor.data

    def add(gathered: Tensor) -> Tensor:
        total = tree_sum(gathered.unbind(0))
        if pending.in_graph:
            return total
        result.copy_(total)
        return tensor

    pending.finish = add
    return pending


def start_tree_sum_and_scatter(tensor: Tensor, axis: Axis, site: str | None = None, *, wait: bool = False) -> Pending:
    """Begin to sum ``tensor`` over ``axis`` in tree order, each rank keeping its equal part of dimension 0.

    Raises:
        ArgonneError: dimension 0 cannot be cut into equal parts.
    """
    if axis.group is None:
        return Pending(tensor)
    require_equal_parts(tensor, axis)
    pending = start_all_gather(tensor.unsqueeze(0), axis, site, wait=wait)
    pending.finish = lambda gathered: tree_sum(gathered.unflatten(1, (axis.size, -1))[:, axis.rank].unbind(0))
    return pending
