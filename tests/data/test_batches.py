from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import (
    Assignment,
    Batch,
    BatchStream,
    DataError,
    LaneState,
    Prefetcher,
    SequenceStream,
)
from argonne.data.assignment import Order
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
    order: Order = "interleaved"

    def ranks(self, dp_size: int, micro_batch: int, accumulation: int) -> list[BatchStream]:
        assignment = Assignment(micro_batch, accumulation, dp_size, self.order)
        streams = []
        for rank in range(dp_size):
            served = assignment.served_lanes(rank, LANES)
            sequences = SequenceStream(self.shards, self.tokenizer, BLOCK, LANES, None, served, self.states)
            streams.append(BatchStream(sequences, assignment, rank, self.sample))
        return streams

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


@pytest.mark.parametrize("start", [5, 24])
@pytest.mark.parametrize("order", ["contiguous", "strided"])
def test_leaves_are_the_same_at_every_layout_and_lanes_advance_as_they_do_without_them(
    shards, tokenizer, order: Order, start: int
) -> None:
    """From a multiple of every batch, and from a sample that no batch would begin at."""
    for leaves, micro in ((8, 1), (4, 3), (12, 2), (6, 2)):
        before = Run(shards, tokenizer)
        before.steps(start, 1, 1, 1)
        samples = Run(shards, tokenizer, before.sample, before.states).steps(3, 1, micro, leaves)
        for size in (size for size in (1, 2, 4) if leaves % size == 0):
            fast = Run(shards, tokenizer, before.sample, before.states).ranks(size, micro, leaves // size)
            ranks = Run(shards, tokenizer, before.sample, before.states, order).ranks(size, micro, leaves // size)
            for step in range(3):
                batches = [rank.next_batch() for rank in ranks]
                tokens = np.stack([batch.tokens for batch in batches], axis=1 if order == "strided" else 0)
                first = start + step * leaves * micro
                for leaf, found in enumerate(tokens.reshape(leaves, micro, BLOCK + 1)):
                    own = [k for k in range(first, first + leaves * micro) if k % leaves == leaf]
                    np.testing.assert_array_equal(found, [samples[k - start] for k in own])
                expected = states_of([rank.next_batch() for rank in fast])
                assert states_of(batches) == expected, f"{leaves} leaves of {micro} on {size} ranks, step {step}"
                assert {batch.step_sample for batch in batches} == {first + leaves * micro}


def states_of(batches: list[Batch]) -> dict[int, LaneState]:
    """Of every lane; ranks that share one agree on it."""
    found: dict[int, LaneState] = {}
    for lane, state in (item for batch in batches for item in batch.states.items()):
        assert found.setdefault(lane, state) == state
    assert sorted(found) == list(range(LANES))
    return found


def test_states_are_those_of_the_batch_taken_whatever_was_prefetched(shards, tokenizer) -> None:
    (plain,) = Run(shards, tokenizer).ranks(1, 2, 2)
    (ahead,) = Run(shards, tokenizer).ranks(1, 2, 2)
    with Prefetcher(ahead.next_batch, depth=4) as prefetcher:
        for _ in range(6):
            expected, batch = plain.next_batch(), prefetcher.get()
            np.testing.assert_array_equal(batch.tokens, expected.tokens)
            assert (batch.states, batch.step_sample) == (expected.states, expected.step_sample)


def test_the_lanes_of_a_batch_stream_are_checked(shards, tokenizer) -> None:
    stream = SequenceStream(shards, tokenizer, BLOCK, LANES, None, [1, 3])
    BatchStream(stream, Assignment(1, 1, 2), replica=1)
    for assignment, replica, message in (
        (Assignment(1, 1, 2), 0, r"rank 0 needs lanes \[0, 2\]"),
        (Assignment(1, 1, 3), 0, r"rank 0 needs lanes \[0, 2\]"),
        (Assignment(1, 4, 2, "contiguous"), 1, r"rank 1 needs lanes \[0, 2\]"),
        (Assignment(1, 1, 2), 2, "rank 2 is outside 0 to 1"),
    ):
        with pytest.raises(DataError, match=message):
            BatchStream(stream, assignment, replica)
