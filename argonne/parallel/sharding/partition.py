"""How the features of one whole tensor are shared out over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from argonne.parallel.communication.layout import require_divisible
from argonne.parallel.errors import LayoutError


@dataclass(frozen=True)
class Partition:
    """The features of one whole tensor, cut into blocks that stay together (a block is a head, say).

    Ranks may hold unequal numbers of blocks, and may share blocks: key-value heads are replicated when
    there are more ranks than heads.
    """

    name: str
    """The name of the sibling that the whole tensor is called after (``q_proj``), or ``""`` for the layer."""
    block: int
    """Features in a block."""
    held: tuple[range, ...]
    """The blocks of each rank."""
    first_has_gradient: bool = False
    """Of a shared block the first holder is given the whole gradient of the output, and the others zeros
    (``shared_heads.py``); otherwise each has what it makes of it, and the ranks' gradients of the weight are summed."""

    @classmethod
    def split(cls, name: str, features: int, ranks: int, uneven: bool = False) -> Partition:
        """Equal parts, one for each rank; with ``uneven``, parts that differ by one feature at most.

        Raises:
            LayoutError: the parts cannot be equal, and may not be unequal.
        """
        if uneven and features % ranks:
            return cls(name, 1, tuple(share(features, ranks, rank) for rank in range(ranks)))
        require_divisible("out_features" if not name else f"out_features of {name}", features, "tensor_parallel", ranks)
        return cls(name, features // ranks, tuple(range(rank, rank + 1) for rank in range(ranks)))

    @classmethod
    def blocks(cls, name: str, block: int, count: int, ranks: int) -> Partition:
        """``count`` blocks of ``block`` features (heads, say), shared out as evenly as they can be, none cut."""
        return cls(name, block, tuple(share(count, ranks, rank) for rank in range(ranks)))

    @property
    def features(self) -> int:
        """Features of the whole tensor."""
        return self.block * max(held.stop for held in self.held)

    @property
    def is_shared(self) -> bool:
        """Whether some block has more than one holder."""
        return sum(len(held) for held in self.held) * self.block > self.features

    @property
    def is_even(self) -> bool:
        """Whether every rank has the same number of features, and none is shared."""
        return len({len(held) for held in self.held}) == 1 and not self.is_shared

    @property
    def is_in_order(self) -> bool:
        """Whether the ranks' features, one rank after the other, are the whole's."""
        return [block for held in self.held for block in held] == list(range(self.features // self.block))

    def local_features(self, rank: int) -> int:
        return self.block * len(self.held[rank])

    def holders(self, block: int) -> tuple[int, ...]:
        return tuple(rank for rank, held in enumerate(self.held) if block in held)

    def runs(self, rank: int) -> Iterator[tuple[tuple[int, ...], range, range]]:
        """What ``rank`` holds, in runs with the same holders: those, the whole's features, the rank's features."""
        local = 0
        for holders, run in groupby(self.held[rank], key=self.holders):
            blocks = list(run)
            count = len(blocks) * self.block
            first = blocks[0] * self.block
            yield holders, range(first, first + count), range(local, local + count)
            local += count


def share(count: int, ranks: int, rank: int) -> range:
    """Which of ``count`` things ``rank`` has when they are shared out as evenly as they can be, in order."""
    return range(rank * count // ranks, (rank + 1) * count // ranks)


def check_partition(partition: Partition, ranks: int) -> None:
    """Raise ``LayoutError`` unless the partition is one of ``ranks`` ranks and leaves no block out.

    Where blocks are shared every rank must hold some: the ranks sum the gradients of the whole together.
    """
    name = partition.name or "features"
    if len(partition.held) != ranks:
        raise LayoutError(f"{name} is a partition for {len(partition.held)} ranks; legal: tensor_parallel={ranks}")
    if missing := set(range(max(held.stop for held in partition.held))).difference(*partition.held):
        raise LayoutError(f"no rank holds blocks {sorted(missing)} of {name}; legal: every block has a holder")
    if partition.is_shared and not all(partition.held):
        raise LayoutError(f"{name} has shared blocks and a rank without any; legal: at least one for each rank")
