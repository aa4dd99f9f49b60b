"""The global order of samples, and the part of each batch that a data-parallel rank holds.

Sample k comes from lane k % lanes, and data-parallel rank d of D holds the samples with k % D == d: the
global batch is the same at every D, only its owners change. Where D divides the lanes, each lane is read by one
rank; where not, by several, which all tokenise it and take their samples of it in turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from einops import rearrange

from argonne.data.errors import DataError
from argonne.data.lanes.packing import Tokens
from argonne.data.lanes.state import LaneState
from argonne.data.mixture import LaneStream, Mixture

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class Batch:
    """One optimizer step's samples on one data-parallel rank."""

    tokens: Tokens
    """[accumulation, micro_batch, block_size + 1]"""
    documents: npt.NDArray[np.int32]
    """The same shape: the number of each token's document within its sequence."""
    states: Mapping[int, LaneState]
    """State of each lane served here once this global batch is consumed; keys as of ``Mixture.states``."""
    step_sample: int
    """Number of the first global sample after this batch."""


def ranks_per_lane(lanes: int, dp_size: int) -> int:
    """How many data-parallel ranks read each lane: 1 where their number divides that of the lanes."""
    return dp_size // math.gcd(lanes, dp_size)


def served_lanes(lanes: int, dp_rank: int, dp_size: int) -> tuple[int, ...]:
    """The lanes that a data-parallel rank reads: all that hold a sample of its own."""
    if not 0 <= dp_rank < dp_size:
        raise DataError(f"data-parallel rank {dp_rank} is outside 0 to {dp_size - 1}")
    apart = math.gcd(lanes, dp_size)
    return tuple(range(dp_rank % apart, lanes, apart))


class BatchStream:
    """One batch per optimizer step for one data-parallel rank.

    Micro-batch a of rank d holds the samples start + (a * micro_batch + i) * dp_size + d, i < micro_batch,
    where `start` is the first sample of the step. `start_sample` may be any number: after the batch size
    changed, steps need not begin at a multiple of it.

    Raises:
        DataError: a size is not legal, or `sequences` does not serve this rank's lanes.
    """

    def __init__(
        self,
        sequences: LaneStream | Mixture,
        *,
        dp_rank: int,
        dp_size: int,
        micro_batch: int,
        accumulation: int,
        start_sample: int = 0,
    ) -> None:
        for name, size in (("micro_batch", micro_batch), ("accumulation", accumulation)):
            if size < 1:
                raise DataError(f"{name}={size} is not a positive number")
        mixture = sequences if isinstance(sequences, Mixture) else Mixture([sequences])
        self._lanes = frozenset(served_lanes(mixture.lanes, dp_rank, dp_size))
        missing = self._lanes - set(mixture.served)
        if missing:
            raise DataError(f"data-parallel rank {dp_rank} needs lanes {sorted(missing)}; they are not served here")
        self._mixture = mixture
        self._rank = dp_rank
        self._ranks = dp_size
        self._accumulation = accumulation
        self._global_batch = micro_batch * accumulation * dp_size
        self._sample = start_sample

    def next_batch(self) -> Batch:
        """This rank's part of the next global batch."""
        start, end = self._sample, self._sample + self._global_batch
        mine = []
        for number in range(start, end):
            if number % self._mixture.lanes in self._lanes:
                sample = self._mixture.sample(number)  # another rank's too, where several read a lane
                if number % self._ranks == self._rank:
                    mine.append(sample)
        self._sample = end
        return Batch(
            tokens=self._micro_batches([each.tokens for each in mine]),
            documents=self._micro_batches([each.documents for each in mine]),
            states=self._mixture.states(),
            step_sample=end,
        )

    def _micro_batches(self, sequences: list[npt.NDArray[Number]]) -> npt.NDArray[Number]:
        return rearrange(np.stack(sequences), "(a m) t -> a m t", a=self._accumulation)
