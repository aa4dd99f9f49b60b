"""The whole data pipeline, read ahead and stopped anywhere: the same tokens, and every row accounted for."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import (
    Assignment,
    BatchStream,
    LaneState,
    Mixture,
    Prefetcher,
    SequenceStream,
    states_of_source,
)
from argonne.data.assignment import Order
from argonne.data.corpus import row_groups
from tests.data.reference import Reference
from tests.data.strategies import boundaries, run, seeds, shapes

segments = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.builds(
            Assignment,
            micro_batch=st.integers(1, 3),
            accumulation=st.integers(1, 2),
            replicas=st.sampled_from([1, 2, 3, 4, 6]),
            order=st.sampled_from(get_args(Order)),
        ),
        st.integers(1, 4),
    ),
    min_size=1,
    max_size=4,
)


@dataclass
class Training:
    """A run as its data sees it: between segments it is stopped, saved, and started in another layout."""

    corpora: list
    shares: list[float]
    tokenizer: object
    block_size: int
    lanes: int
    boundary: tuple[int, int] | None
    sample: int = 0
    states: dict[int, LaneState] = field(default_factory=dict)

    def go_on(self, steps: int, assignment: Assignment, depth: int) -> list[np.ndarray]:
        """The samples of ``steps`` steps in their order, ids above the numbers of their documents."""
        streams = [self._stream(assignment, rank) for rank in range(assignment.replicas)]
        prefetchers = [Prefetcher(stream.next_batch, depth) for stream in streams]
        samples = []
        for _ in range(steps):
            batches = [prefetcher.get() for prefetcher in prefetchers]
            delivered: dict[int, np.ndarray] = {}
            for rank, batch in enumerate(batches):
                numbers = assignment.samples(rank, self.sample).reshape(-1).tolist()
                rows = np.stack([batch.tokens, batch.documents], -2).reshape(-1, 2, self.block_size + 1)
                delivered |= dict(zip(numbers, rows, strict=True))
            samples += [delivered[number] for number in sorted(delivered)]
            (self.sample,) = {batch.step_sample for batch in batches}
            states: dict[int, LaneState] = {}
            for key, state in (item for batch in batches for item in batch.states.items()):
                assert states.setdefault(key, state) == state  # ranks that share a lane agree on it
            self.states = {
                key: LaneState.from_dict(json.loads(json.dumps(state.to_dict()))) for key, state in states.items()
            }
        for prefetcher in prefetchers:
            prefetcher.close()
        return samples

    def _stream(self, assignment: Assignment, rank: int) -> BatchStream:
        served = assignment.served_lanes(rank, self.lanes)
        sources = [
            SequenceStream(
                shards,
                self.tokenizer,
                self.block_size,
                self.lanes,
                self.boundary,
                served,
                states_of_source(self.states, number, self.lanes),
            )
            for number, shards in enumerate(self.corpora)
        ]
        return BatchStream(Mixture(sources, self.shares), assignment, rank, self.sample)


@run(40)
@given(
    st.lists(shapes(7), min_size=1, max_size=2),
    seeds,
    st.floats(0, 0.7),
    st.sampled_from([4, 8]),
    st.integers(1, 40),
    boundaries,
    segments,
    st.booleans(),
)
def test_any_stops_layouts_and_reading_ahead_leave_every_token_in_its_place(
    shards_of, corpus_of, tokenizer, corpora, seed, rejected, lanes, block_size, boundary, segments, streamed
) -> None:
    texts = [corpus_of(shape, seed + number, rejected) for number, shape in enumerate(corpora)]
    shares = [1.0, 0.4][: len(texts)]
    arguments = ([shards_of(each) for each in texts], shares, tokenizer, block_size, lanes, boundary)
    broken, whole = Training(*arguments), Training(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        if streamed:  # read piece by piece, as large row groups are
            patch.setattr(row_groups, "STREAMED_BYTES", 0)
        samples = [sample for segment in segments for sample in broken.go_on(*segment)]
    expected = whole.go_on(len(samples), Assignment(1, 1), 1)
    np.testing.assert_array_equal(np.array(samples), np.array(expected))
    assert broken.states == whole.states

    delivered: Counter[int] = Counter()
    for number, (ids, documents) in enumerate(samples):
        source = broken_source(shares, number)
        delivered[source * lanes + number % lanes] += len(ids)
        # Numbers begin at 0 and rise by one where a document begins.
        assert documents[0] == 0
        assert set(np.diff(documents)) <= {0, 1}
    for key, state in broken.states.items():
        assert state.tokens == delivered[key]
        passed(state, Reference(texts[key // lanes], tokenizer, lanes, boundary), key % lanes)


def broken_source(shares: list[float], number: int) -> int:
    place = (number + 1) * 0x9E3779B97F4A7C15 % 2**64 / 2**64
    return int(place >= shares[0] / sum(shares))


def passed(state: LaneState, reference: Reference, lane: int) -> None:
    """Every row before the position was delivered or is counted among the dropped, and nothing else was."""
    tokens = documents = 0
    dropped: Counter[str] = Counter()
    for position, outcome in islice(reference.rows(lane), 100_000):
        place = (position.epoch, position.shard, position.row_group, position.row)
        if place == (state.position.epoch, state.position.shard, state.position.row_group, state.position.row):
            break
        if isinstance(outcome, str):
            dropped[outcome] += 1
        else:
            documents += 1
            tokens += len(outcome)
    assert (state.tokens, state.documents, state.dropped) == (tokens + state.position.token, documents, dict(dropped))
