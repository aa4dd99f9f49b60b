"""Packing from a token cache: the same sequences in every epoch's own order, resumable by their number alone.

The documents of the corpus, in canonical order, are one circle of T tokens, and window w is the tokens from
w * (block_size + 1) on of its endless repetition: the tail of a pass goes on in the next, and nothing is left
out. Epoch e owns the windows that start in pass e, and delivers them in an order of its own (`Permutation`),
drawn over the whole corpus. Sequence g of the run is lane g % lanes' sequence g // lanes: the order does not
depend on who reads, and the place in it is g.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from argonne.data.cache.permutation import Permutation
from argonne.data.cache.store import TokenCache
from argonne.data.errors import DataError
from argonne.data.lanes.packing import Packed, check_lanes
from argonne.data.lanes.reader import dropped_summary
from argonne.data.lanes.state import DataPosition, LaneState


class CachedStream:
    """Endless sequences of block_size + 1 tokens from each of the lanes served: what `SequenceStream` is to shards.

    A lane's state means:

    - `tokens`: tokens delivered; by it alone the lane goes on.
    - `position`: the first token of the lane's next sequence, and the epoch that owns it. A sequence is the next
      in a shuffled order, so that positions do not ascend.
    - `documents`: documents that ended in a sequence of the lane.
    - `dropped`: on lane 0, the corpus's dropped rows, once for each epoch up to that of the lane's last sequence;
      empty on the others, so that the sum over all lanes tells of the whole corpus.

    Args:
        lanes: lanes of the whole run; fixed for its life.
        served: the lanes that are read here.
        states: the states of all lanes, in lane order, to go on from; None starts at the beginning.

    Raises:
        DataError: an argument is out of range, the cache holds less than one sequence, or a state is not one of
            this cache, block size, number of lanes and seed.
    """

    def __init__(
        self,
        cache: TokenCache,
        block_size: int,
        lanes: int,
        served: Sequence[int],
        seed: int,
        states: Sequence[LaneState] | None = None,
    ) -> None:
        check_lanes(block_size, lanes, served, states)
        check_cache(cache, block_size)
        self.block_size = block_size
        self.lanes = lanes
        self.served = tuple(served)
        self._cache = cache
        self._length = block_size + 1
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: Permutation(self._first_window(epoch + 1) - self._first_window(epoch), seed, epoch)
        )
        self._delivered = dict.fromkeys(served, 0)
        self._documents = dict.fromkeys(served, 0)
        if states is not None:
            for lane in served:
                self._go_on(lane, states[lane])

    def next_sequence(self, lane: int) -> Packed:
        """The lane's next sequence of block_size + 1 tokens.

        Raises:
            DataError: a file of the cache cannot be opened any more.
        """
        _, start = self._next(lane)
        packed, documents = self._cache.read(start, self._length)
        self._delivered[lane] += 1
        self._documents[lane] += documents
        return packed

    def state(self, lane: int) -> LaneState:
        """The lane's state after the last sequence it delivered."""
        epoch, start = self._next(lane)
        delivered = self._delivered[lane]
        dropped = {}
        if lane == 0 and delivered:
            begun = 1 + self._epoch((delivered - 1) * self.lanes)
            dropped = {reason: begun * count for reason, count in self._cache.dropped.items()}
        return LaneState(
            DataPosition(epoch, *self._cache.position(start)),
            self._documents[lane],
            delivered * self._length,
            dropped,
        )

    @classmethod
    def adopt(
        cls, cache: TokenCache, block_size: int, lanes: int, seed: int, states: Sequence[LaneState]
    ) -> list[LaneState]:
        """The states of all lanes as they go on in another cache: as many sequences on, in its order."""
        stream = cls(cache, block_size, lanes, range(lanes), seed)
        for lane, state in enumerate(states):
            stream._delivered[lane] = state.tokens // stream._length
            stream._documents[lane] = state.documents
        return [stream.state(lane) for lane in range(lanes)]

    def _next(self, lane: int) -> tuple[int, int]:
        """The epoch of the lane's next sequence, and its first token's place on the circle."""
        number = self._delivered[lane] * self.lanes + lane
        epoch = self._epoch(number)
        first = self._first_window(epoch)
        window = first + self._order(epoch)(number - first)
        return epoch, window * self._length % self._cache.tokens

    def _epoch(self, number: int) -> int:
        """The epoch that owns sequence `number` of the run: an epoch's windows are a range, whatever their order."""
        return number * self._length // self._cache.tokens

    def _first_window(self, epoch: int) -> int:
        """The first window that starts in pass `epoch` or later."""
        return -(-epoch * self._cache.tokens // self._length)

    def _go_on(self, lane: int, state: LaneState) -> None:
        self._delivered[lane], rest = divmod(state.tokens, self._length)
        self._documents[lane] = state.documents
        if rest or state.position != self.state(lane).position:
            raise DataError(
                f"data position {state.position.to_dict()} of lane {lane} is not where {state.tokens} tokens lead to; "
                "data, tokenizer, block size, lanes and seed must be those it was saved with"
            )


def check_cache(cache: TokenCache, block_size: int) -> None:
    """Refuse a cache that cannot fill one sequence of block_size + 1 tokens.

    Raises:
        DataError: says how many tokens there are, or why every row was dropped.
    """
    if not cache.tokens:
        raise DataError(f"no usable documents in the data; rows dropped: {dropped_summary(cache.dropped)}")
    if cache.tokens <= block_size:
        raise DataError(
            f"block_size={block_size} needs {block_size + 1} tokens and the data holds only {cache.tokens}; "
            f"legal block sizes: 1 to {cache.tokens - 1}"
        )
