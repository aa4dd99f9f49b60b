from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import (
    Batch,
    BatchStream,
    DataError,
    LaneState,
    Prefetcher,
    SequenceStream,
    ranks_per_lane,
    served_lanes,
)
from tests.data.strategies import layouts, run

BLOCK = 12
LANES = 4


@dataclass
class Run:
    """A training run as its data sees it: it may stop anywhere and go on with another layout."""

    shards: object
    tokenizer: object
    sample: int = 0
    states: list[LaneState] | None = None

    def ranks(self, dp_size: int, micro_batch: int, accumulation: int) -> list[BatchStream]:
        return [
            BatchStream(
                SequenceStream(
                    self.shards,
                    self.tokenizer,
                    BLOCK,
                    LANES,
                    None,
                    served_lanes(LANES, rank, dp_size),
                    self.states,
                ),
                dp_rank=rank,
                dp_size=dp_size,
                micro_batch=micro_batch,
                accumulation=accumulation,
                start_sample=self.sample,
            )
            for rank in range(dp_size)
        ]

    def steps(self, count: int, dp_size: int, micro_batch: int, accumulation: int) -> list[np.ndarray]:
        """The samples of `count` steps in their global order, then a save."""
        samples = []
        ranks = self.ranks(dp_size, micro_batch, accumulation)
        for _ in range(count):
            batches = [rank.next_batch() for rank in ranks]
            samples += global_order(batches, self.sample)
            (self.sample,) = {batch.step_sample for batch in batches}
        states = {lane: state for batch in batches for lane, state in batch.states.items()}
        assert sorted(states) == list(range(LANES))
        self.states = [LaneState.from_dict(json.loads(json.dumps(states[lane].to_dict()))) for lane in range(LANES)]
        return samples


def global_order(batches: list[Batch], start: int) -> list[np.ndarray]:
    """Sample k is with rank k % dp_size, in the order of that rank's micro-batches."""
    queues = [iter(batch.tokens.reshape(-1, BLOCK + 1)) for batch in batches]
    total = sum(batch.tokens.shape[0] * batch.tokens.shape[1] for batch in batches)
    return [next(queues[sample % len(batches)]) for sample in range(start, start + total)]


@pytest.fixture(scope="module")
def shards(shards_of, corpus_of):
    return shards_of(corpus_of([[9, 7], [12, 3, 5]], seed=1))


@run(25)
@given(st.lists(layouts, min_size=1, max_size=4))
def test_the_global_order_is_the_same_through_any_change_of_layout_and_batch_size(shards, tokenizer, segments) -> None:
    changing = Run(shards, tokenizer)
    samples = [sample for segment in segments for sample in changing.steps(*segment)]
    constant = Run(shards, tokenizer).steps(len(samples), dp_size=1, micro_batch=1, accumulation=1)
    np.testing.assert_array_equal(samples, constant)


def test_data_parallel_1_2_4_1_keeps_the_order_of_a_run_that_never_changed(shards, tokenizer) -> None:
    changing = Run(shards, tokenizer)
    samples = [
        sample
        for dp_size, accumulation in ((1, 8), (2, 4), (4, 2), (1, 8))
        for sample in changing.steps(2, dp_size, micro_batch=1, accumulation=accumulation)
    ]
    steady = Run(shards, tokenizer)
    np.testing.assert_array_equal(samples, steady.steps(8, dp_size=1, micro_batch=8, accumulation=1))
    assert changing.states == steady.states


def test_each_micro_batch_holds_the_samples_that_the_formula_names(shards, tokenizer) -> None:
    ranks, micro, accumulation, steps = 2, 3, 2, 2
    size = micro * accumulation * ranks
    stream = SequenceStream(shards, tokenizer, BLOCK, LANES, None, range(LANES))
    samples = [stream.next_sequence(sample % LANES).tokens for sample in range(size * steps)]
    for rank, batches in enumerate(Run(shards, tokenizer).ranks(ranks, micro, accumulation)):
        for step in range(steps):
            tokens = batches.next_batch().tokens
            assert (tokens.shape, tokens.dtype) == ((accumulation, micro, BLOCK + 1), np.dtype(np.int64))
            for a in range(accumulation):
                for i in range(micro):
                    number = step * size + (a * micro + i) * ranks + rank
                    np.testing.assert_array_equal(tokens[a, i], samples[number])


def test_states_are_those_of_the_batch_taken_whatever_was_prefetched(shards, tokenizer) -> None:
    (plain,) = Run(shards, tokenizer).ranks(1, 2, 2)
    (ahead,) = Run(shards, tokenizer).ranks(1, 2, 2)
    with Prefetcher(ahead.next_batch, depth=4) as prefetcher:
        for _ in range(6):
            expected, batch = plain.next_batch(), prefetcher.get()
            np.testing.assert_array_equal(batch.tokens, expected.tokens)
            assert (batch.states, batch.step_sample) == (expected.states, expected.step_sample)


@pytest.mark.parametrize(
    ("dp_size", "sharing"), [(1, 1), (2, 1), (4, 1), (8, 1), (3, 3), (6, 3), (12, 3), (16, 2), (5, 5)]
)
def test_every_lane_is_read_by_as_few_ranks_as_hold_its_samples(dp_size: int, sharing: int) -> None:
    assert ranks_per_lane(8, dp_size) == sharing
    readers = Counter(lane for rank in range(dp_size) for lane in served_lanes(8, rank, dp_size))
    assert readers == dict.fromkeys(range(8), sharing)
    for rank in range(dp_size):
        assert set(served_lanes(8, rank, dp_size)) == {k % 8 for k in range(rank, 8 * dp_size, dp_size)}


def test_a_rank_that_there_is_not_serves_nothing() -> None:
    with pytest.raises(DataError, match="rank 4 is outside 0 to 3"):
        served_lanes(8, 4, 4)


def test_sizes_and_served_lanes_of_a_batch_stream_are_checked(shards, tokenizer) -> None:
    stream = SequenceStream(shards, tokenizer, BLOCK, LANES, None, [1, 3])
    legal = {"dp_rank": 1, "dp_size": 2, "micro_batch": 1, "accumulation": 1}
    BatchStream(stream, **legal)
    for change, message in (
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"dp_rank": 0}, r"rank 0 needs lanes \[0, 2\]"),
        ({"dp_rank": 0, "dp_size": 3}, r"rank 0 needs lanes \[0, 2\]"),
        ({"dp_rank": 2}, "rank 2 is outside 0 to 1"),
    ):
        with pytest.raises(DataError, match=message):
            BatchStream(stream, **{**legal, **change})
