"""Which samples of a global batch are in which micro-batch of which data-parallel rank.

A batch is dealt out by the numbers of its samples alone, so that it is the same at every layout and only its owners
change. What is added up over it is the same to the last bit only if its micro-batches are the same too: the orders of
leaves have M = accumulation x replicas of them, of which number p has the samples k with k % M == p, whoever has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from argonne.data.errors import DataError

Order = Literal["interleaved", "contiguous", "strided"]
"""How micro-batches are cut and dealt out. ``interleaved``: replica d of D has the samples k with k % D == d, cut in a
row, so that micro-batches of more than one sequence depend on D. The others deal out leaves: ``contiguous``: replica d
has a row of them, d * accumulation the first; ``strided``: its micro-batch a is the leaf a * D + d."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Assignment:
    """The owners of every step's samples.

    Raises:
        DataError: a size is not positive, or the order is unknown.
    """

    micro_batch: int
    """Sequences of a micro-batch."""
    accumulation: int
    """Micro-batches of a step on each data-parallel rank."""
    replicas: int = 1
    """Data-parallel ranks."""
    order: Order = "interleaved"

    def __post_init__(self) -> None:
        for name in ("micro_batch", "accumulation", "replicas"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)} is not a positive number")
        if self.order not in get_args(Order):
            raise DataError(f"order={self.order!r} of samples is not known; legal: {', '.join(get_args(Order))}")

    @property
    def global_batch(self) -> int:
        """Sequences of a step."""
        return self.micro_batch * self.accumulation * self.replicas

    @property
    def leaves(self) -> int:
        """Micro-batches of a step on all data-parallel ranks together: M."""
        return self.accumulation * self.replicas

    def samples(self, replica: int, start: int) -> Numbers:
        """``[accumulation, micro_batch]``: the samples of ``replica`` in the step whose first sample is ``start``.

        ``start`` may be any number: after the batch size changed, steps need not begin at a multiple of it.

        Raises:
            DataError: there is no such replica.
        """
        if not 0 <= replica < self.replicas:
            raise DataError(f"data-parallel rank {replica} is outside 0 to {self.replicas - 1}")
        micro_batches, sequences = np.arange(self.accumulation)[:, None], np.arange(self.micro_batch)
        if self.order == "interleaved":
            first = (replica - start) % self.replicas
            return start + first + self.replicas * (self.micro_batch * micro_batches + sequences)
        leaves = np.asarray(self.leaves_of(replica))[:, None]
        return start + (leaves - start) % self.leaves + self.leaves * sequences

    def leaves_of(self, replica: int) -> range:
        """The numbers of its micro-batches among all of a step's."""
        if self.order == "contiguous":
            return range(replica * self.accumulation, (replica + 1) * self.accumulation)
        return range(replica, self.leaves, self.replicas)

    def places(self, start: int) -> Numbers:
        """``[global_batch]``: where the samples of that step are, in the order of their numbers.

        A place is an index into what the replicas have of it, one replica after the other.
        """
        return np.argsort(np.concatenate([self.samples(d, start).reshape(-1) for d in range(self.replicas)]))

    def served_lanes(self, replica: int, lanes: int) -> tuple[int, ...]:
        """The lanes that ``replica`` reads: all that ever hold a sample of its own, where sample k is of k % lanes."""
        # Steps move a sample on by the global batch: by and by to every lane that is a multiple of this further.
        apart = math.gcd(self.global_batch, lanes)
        own = np.isin(np.arange(apart), self.samples(replica, 0) % apart)
        return tuple(np.flatnonzero(np.tile(own, lanes // apart)).tolist())

    def readers(self, lanes: int) -> int:
        """How many data-parallel ranks read each lane: 1 where lanes and samples are dealt out alike."""
        return self.replicas * len(self.served_lanes(0, lanes)) // lanes
