"""The global order of samples, and the part of each batch that a data-parallel rank holds.

Sample k comes from lane k % lanes, and an ``Assignment`` says whose it is: the global batch is the same at every number
of ranks, only its owners change. A lane that has samples of several ranks is tokenised by all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from einops import rearrange

from argonne.data.assignment import Assignment
from argonne.data.errors import DataError
from argonne.data.lanes.packing import Packed, Tokens
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
    weights: npt.NDArray[np.int32] | None = None
    """As ``tokens``: what the loss of each counts; None: each counts 1."""


class BatchStream:
    """One batch per optimizer step for one data-parallel rank, from the sample of number ``start_sample`` on.

    Raises:
        DataError: there is no such rank, or ``sequences`` does not serve its lanes (``assignment.served_lanes``).
    """

    def __init__(
        self, sequences: LaneStream | Mixture, assignment: Assignment, replica: int = 0, start_sample: int = 0
    ) -> None:
        mixture = sequences if isinstance(sequences, Mixture) else Mixture([sequences])
        self.assignment = assignment
        self._lanes = frozenset(assignment.served_lanes(replica, mixture.lanes))
        if missing := self._lanes - set(mixture.served):
            raise DataError(f"data-parallel rank {replica} needs lanes {sorted(missing)}; they are not served here")
        self._mixture = mixture
        self._replica = replica
        self._sample = start_sample

    def next_batch(self) -> Batch:
        """This rank's part of the next global batch."""
        start, end = self._sample, self._sample + self.assignment.global_batch
        numbers = self.assignment.samples(self._replica, start).reshape(-1).tolist()
        own = set(numbers)
        read: dict[int, Packed] = {}
        for number in range(start, end):
            if number % self._mixture.lanes in self._lanes:
                sample = self._mixture.sample(number)  # another rank's too, where several read a lane
                if number in own:
                    read[number] = sample
        self._sample = end
        weights = [each.weights for number in numbers if (each := read[number]).weights is not None]
        return Batch(
            tokens=self._micro_batches([read[number].tokens for number in numbers]),
            documents=self._micro_batches([read[number].documents for number in numbers]),
            states=self._mixture.states(),
            step_sample=end,
            weights=self._micro_batches(weights) if weights else None,
        )

    def _micro_batches(self, sequences: list[npt.NDArray[Number]]) -> npt.NDArray[Number]:
        return rearrange(np.stack(sequences), "(a m) t -> a m t", a=self.assignment.accumulation)
