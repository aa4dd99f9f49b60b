"""Mixing corpora by weight: which of them a sample of the run comes from follows from its number alone."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from argonne.data.errors import DataError
from argonne.data.lanes.packing import Packed
from argonne.data.lanes.state import LaneState
from argonne.parallel.legal import LARGEST

# The fractional parts of k times the golden ratio fill the unit interval as evenly as any sequence can.
_GOLDEN = 0x9E3779B97F4A7C15
_ONE = 1 << 64

LEAST_SHARE = 1e-15
"""Of a corpus among all: one sample in so many is more than any run has."""


class LaneStream(Protocol):
    """Endless sequences of each lane served here: ``SequenceStream`` or ``CachedStream``."""

    block_size: int
    lanes: int
    served: tuple[int, ...]

    def next_sequence(self, lane: int) -> Packed:
        """The lane's next sequence."""

    def state(self, lane: int) -> LaneState:
        """The lane's state after the last sequence it delivered."""


@dataclass(frozen=True)
class Weighted:
    """The globs of one corpus, and its share of the sequences."""

    globs: tuple[str, ...]
    weight: float


def parse_globs(words: Sequence[str]) -> tuple[Weighted, ...]:
    """What ``--data-glob`` names: without weights one corpus; ``A:0.7 B:0.3`` are two, mixed.

    Weights need not add up to 1; each is divided by their sum. A word that is the name of a file has no weight.

    Raises:
        DataError: some have a weight and others do not, or one is not positive.
    """
    split = [_split(word) for word in words]
    plain = [glob for glob, weight in split if weight is None]
    if len(plain) == len(split):
        return (Weighted(tuple(plain), 1.0),)
    if plain:
        raise DataError(
            f"data_glob={plain[0]!r} has no weight but others have; legal: GLOB:WEIGHT for all, or for none"
        )
    weights = [weight for _, weight in split if weight is not None]
    for word, weight in zip(words, weights, strict=True):
        if not (0 < weight <= LARGEST):
            raise DataError(f"data_glob={word!r} has a weight of {weight:g}; legal: more than 0, at most {LARGEST}")
        if weight / sum(weights) < LEAST_SHARE:
            raise DataError(
                f"data_glob={word!r} has a weight of {weight:g}, which is none beside the others; "
                f"legal: a share of {LEAST_SHARE} or more"
            )
    return tuple(Weighted((glob,), weight / sum(weights)) for (glob, _), weight in zip(split, weights, strict=True))


def _split(word: str) -> tuple[str, float | None]:
    found = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", word)
    if found is None or Path(word).exists() or re.fullmatch(r"[a-z0-9+]+://[^/]*", word):
        return word, None
    return found[1], float(found[2])


class Mixture:
    """One stream of samples out of several streams of lanes, in proportion to their weights.

    Sample k is the next sequence of lane k % lanes of one of the streams; which one depends on k and the weights
    alone, and among any run of samples the shares are as near to the weights as a few samples allow.

    Raises:
        DataError: the streams do not fit together.
    """

    def __init__(self, streams: Sequence[LaneStream], weights: Sequence[float] = (1.0,)) -> None:
        first = streams[0]
        for stream in streams:
            if (stream.lanes, stream.served, stream.block_size) != (first.lanes, first.served, first.block_size):
                raise DataError("the streams of a mixture differ in lanes or block_size; legal: the same for all")
        if len(weights) != len(streams) or not all(weight > 0 for weight in weights):
            raise DataError(f"weights={list(weights)} of {len(streams)} streams; legal: a positive one for each")
        self.lanes, self.served = first.lanes, first.served
        self._streams = tuple(streams)
        total = math.fsum(weights)
        # Whole numbers: the same choice on every machine.
        self._ends = [round(share / total * _ONE) for share in accumulate(weights)][:-1]
        self._states: dict[int, LaneState] = {}
        # The keys of lanes that have moved since their state was looked up: of many lanes a batch moves few.
        self._moved = {index * self.lanes + lane for index in range(len(streams)) for lane in self.served}

    def source(self, sample: int) -> int:
        """The index of the stream that the sample comes from."""
        return bisect_right(self._ends, (sample + 1) * _GOLDEN % _ONE)

    def sample(self, number: int) -> Packed:
        """The sample of that number; those of a lane must be asked for in order."""
        source, lane = self.source(number), number % self.lanes
        self._moved.add(source * self.lanes + lane)
        return self._streams[source].next_sequence(lane)

    def states(self) -> dict[int, LaneState]:
        """The state of each lane that is served here, of stream s under the key s * lanes + lane."""
        for key in sorted(self._moved):
            self._states[key] = self._streams[key // self.lanes].state(key % self.lanes)
        self._moved.clear()
        return dict(self._states)


def states_of_source(states: Mapping[int, LaneState], source: int, lanes: int) -> list[LaneState] | None:
    """The states of one stream's lanes out of all of a mixture's; None where there are none yet.

    Raises:
        DataError: some are missing.
    """
    if not states:
        return None
    keys = range(source * lanes, (source + 1) * lanes)
    if missing := [key for key in keys if key not in states]:
        raise DataError(f"the saved data position lacks lane {missing[0]}; legal: one for each of {lanes} lanes")
    return [states[key] for key in keys]
