"""How many processes share the work along each parallel axis: pure arithmetic, no communication."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from argonne.parallel.errors import LayoutError

# Outermost first. Neighbouring ranks share a tensor-parallel group, so that the axis that communicates
# most stays within a node.
AXES = ("pipeline", "data", "context", "tensor")


@dataclass(frozen=True)
class Layout:
    """The size of every parallel axis. ``Layout()`` is the dense model: the same code, collectives skipped."""

    tensor: int = 1
    """Processes that share each layer's weights (tensor parallelism)."""
    pipeline: int = 1
    """Processes that hold successive groups of layers (pipeline parallelism)."""
    data: int = 1
    """Replicas of the model, each with its own part of the global batch (data parallelism)."""
    context: int = 1
    """Processes that share each sequence (context parallelism)."""
    sequence_parallel: bool = False
    """Between the tensor-parallel layers, each tensor-parallel rank has its share of the tokens (arXiv
    2205.05198); without effect when ``tensor`` is 1."""
    uneven_shards: bool = False
    """Allow models whose heads or feed-forward features do not divide by ``tensor``: some ranks then have
    one more than others, and the others wait for them."""

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or size < 1:
                raise LayoutError(f"{axis}_parallel={size!r} is not a number of processes; legal: 1 or more")

    @property
    def world_size(self) -> int:
        """The number of processes that this layout needs."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def sizes(self) -> tuple[int, ...]:
        """The axis sizes in the order of ``AXES``."""
        return tuple(getattr(self, axis) for axis in AXES)

    def require_world_size(self, world_size: int) -> None:
        """Raise ``LayoutError`` unless ``world_size`` processes are exactly what the layout needs."""
        if world_size != self.world_size:
            raise LayoutError(
                f"world size {world_size} does not match the layout {self}, which needs {self.world_size} "
                f"(--nproc {self.world_size}, or axis sizes whose product is {world_size})"
            )

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """The place of global ``rank`` on each of ``AXES``; tensor parallelism varies fastest."""
        return tuple(map(int, np.unravel_index(rank, self.sizes)))

    def __str__(self) -> str:
        shared = [f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        text = " x ".join(shared) or "tensor=1"
        return text + (" + sequence" if self.sequence_parallel and self.tensor > 1 else "")


def divisors(number: int) -> list[int]:
    """The divisors of ``number``, ascending: the legal sizes that an error message names."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def require_divisible(field: str, value: int, by: str, size: int) -> None:
    """Raise ``LayoutError`` naming both fields and the legal sizes unless ``size`` divides ``value``."""
    if value % size:
        legal = ", ".join(map(str, divisors(value)))
        raise LayoutError(f"{field}={value} is not divisible by {by}={size}; legal sizes: {legal}")


def require_blocks(blocks: int, tensor: int) -> None:
    """Raise ``LayoutError`` unless ``tensor`` ranks can each have a subtree of the tree over ``blocks`` blocks.

    That takes a power of two of them on each rank, or one rank that has them all.
    """
    if blocks < 1:
        raise LayoutError(f"canonical blocks={blocks} are no number of blocks; legal: 1 or more")
    legal = [size for size in divisors(blocks) if size == 1 or (blocks // size).bit_count() == 1]
    if tensor not in legal:
        raise LayoutError(
            f"tensor_parallel={tensor} does not share out {blocks} canonical blocks in subtrees of one size; "
            f"legal sizes: {', '.join(map(str, legal))}"
        )


def ranks_of(ranks: Collection[int]) -> str:
    """``rank 1`` or ``ranks 0, 2``; of many the first ones."""
    ranks = sorted(set(ranks))
    shown = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
