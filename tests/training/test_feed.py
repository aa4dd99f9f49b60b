"""What a batch is known by, and what the ranks that share it are handed, whatever the layout and the first sample.

Of reading ahead: what is told belongs to the batch that is handed out; an error comes in its turn, to all ranks.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from argonne.data import Assignment, Batch, BatchStream, DataError, DataPosition, LaneState
from argonne.data.assignment import Order
from argonne.data.lanes.packing import Packed
from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.communication.layout import AXES
from argonne.training.feed import BatchFeed
from tests.pool import RankPool

BLOCK, SAMPLES, START = 5, 12, 3
"""START is a multiple of no number of replicas below: after the batch size changed, steps may begin anywhere."""


class Numbered:
    """One lane: sequence n, and the numbers of its documents, are drawn from n alone."""

    block_size, lanes, served = BLOCK, 1, (0,)

    def __init__(self, number: int) -> None:
        self.number = number

    def next_sequence(self, lane: int) -> Packed:
        draw = np.random.default_rng(self.number)
        self.number += 1
        return Packed(draw.integers(1000, size=BLOCK + 1), draw.integers(3, size=BLOCK + 1, dtype=np.int32))

    def state(self, lane: int) -> LaneState:
        return LaneState(DataPosition(0, 0, 0, self.number))


Steps = list[tuple[str | None, Tensor, Tensor | None, dict[int, LaneState]]]


def two_steps(groups: ProcessGroups, micro_batch: int, order: Order = "interleaved") -> Steps:
    """Digest, tokens, documents and states of each."""
    data = groups.data
    accumulation = SAMPLES // (micro_batch * data.size)
    reading = groups.model.rank == 0
    stream = BatchStream(Numbered(START), Assignment(micro_batch, accumulation, data.size, order), data.rank, START)
    feed = BatchFeed(stream if reading else None, (accumulation, micro_batch, BLOCK + 1), groups, documents=True)
    batches = [feed.next() for _ in range(2)]
    feed.close()
    return [(batch.digest, batch.tokens, batch.documents, dict(batch.states)) for batch in batches]


@pytest.mark.parametrize(
    ("layout", "micro_batch"),
    [(Layout(), 4), (Layout(data=2), 3), (Layout(data=4), 1), (Layout(tensor=2, data=2), 2)],
    ids=str,
)
def test_every_rank_has_its_samples_and_the_hash_is_that_of_one_process(
    ranks: RankPool, layout: Layout, micro_batch: int
) -> None:
    alone = [digest for digest, *_ in ranks.run(Layout(), two_steps, 6)[0]]
    assert len({*alone}) == 2
    for rank, found in enumerate(ranks.run(layout, two_steps, micro_batch)):
        replica = layout.coordinates(rank)[AXES.index("data")]
        for step, (digest, tokens, documents, _) in enumerate(found):
            assert digest == alone[step] if digest else rank % layout.tensor
            first = START + step * SAMPLES
            own = [k for k in range(first, first + SAMPLES) if k % layout.data == replica]
            for sample, ids, apart in zip(own, tokens.flatten(0, 1), documents.flatten(0, 1), strict=True):
                wanted = Numbered(sample).next_sequence(0)
                assert ids.tolist() == wanted.tokens.tolist(), f"sample {sample} on rank {rank}"
                assert apart.tolist() == wanted.documents.tolist(), f"documents of sample {sample} on rank {rank}"


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("order", ["contiguous", "strided"])
@pytest.mark.parametrize(
    "layout", [Layout(), Layout(data=2), Layout(data=4), Layout(tensor=2, data=2), Layout(pipeline=2)], ids=str
)
def test_leaves_come_to_their_ranks_with_the_hash_and_states_of_other_runs(
    ranks: RankPool, layout: Layout, order: Order, micro_batch: int
) -> None:
    alone, leaves = ranks.run(Layout(), two_steps, 6)[0], SAMPLES // micro_batch
    accumulation = leaves // layout.data
    for rank, found in enumerate(ranks.run(layout, two_steps, micro_batch, order)):
        replica = layout.coordinates(rank)[AXES.index("data")]
        for step, (digest, tokens, _, states) in enumerate(found):
            reads = rank % layout.tensor == 0 and layout.coordinates(rank)[AXES.index("pipeline")] == 0
            assert (digest, states) == ((alone[step][0], alone[step][3]) if reads else (None, {})), f"rank {rank}"
            first = START + step * SAMPLES
            for micro, sequences in enumerate(tokens):
                leaf = replica * accumulation + micro if order == "contiguous" else micro * layout.data + replica
                own = [k for k in range(first, first + SAMPLES) if k % leaves == leaf]
                wanted = [Numbered(sample).next_sequence(0).tokens.tolist() for sample in own]
                assert sequences.tolist() == wanted, f"micro-batch {micro} of rank {rank}"


class Told:
    """A stream of ``[2, 3, 4]`` ids that are the number of their batch, and then an error; it counts its calls."""

    def __init__(self, last: int = 10**6, error: Exception | None = None) -> None:
        self.last, self.error, self.calls = last, error, 0
        self.assignment = Assignment(micro_batch=3, accumulation=2)
        self.ahead = threading.Semaphore(0)

    def next_batch(self) -> Batch:
        self.calls += 1
        self.ahead.release()
        number = self.calls
        if number > self.last:
            assert self.error is not None
            raise self.error
        documents = np.full((2, 3, 4), number % 3, dtype=np.int32)
        states = {5: LaneState(DataPosition(0, number, 2 * number, 3 * number), documents=7 * number)}
        return Batch(np.full((2, 3, 4), number), documents, states, 6 * number)


def fed(stream: Told | None, groups: ProcessGroups, documents: bool = False, depth: int = 2) -> BatchFeed:
    return BatchFeed(stream, (2, 3, 4), groups, documents, depth)  # type: ignore[arg-type]


def test_what_is_told_belongs_to_the_batch_that_is_handed_out_however_far_the_reading_is_ahead() -> None:
    stream = Told()
    feed = fed(stream, ProcessGroups.single(), depth=4)
    for number in range(1, 4):
        for _ in range(4 if number == 1 else 1):  # the thread has begun the batch that is four further on
            assert stream.ahead.acquire(timeout=60)
        batch = feed.next()
        assert batch.tokens.unique().tolist() == [number]
        assert batch.next_sample == 6 * number
        assert batch.states == {5: LaneState(DataPosition(0, number, 2 * number, 3 * number), documents=7 * number)}
        assert stream.calls <= number + 4, "more is read ahead than the depth says"
    feed.close()


def test_numbers_of_documents_are_handed_out_only_where_they_are_asked_for() -> None:
    for documents in (False, True):
        feed = fed(Told(), ProcessGroups.single(), documents)
        first, second = feed.next(), feed.next()
        feed.close()
        assert first.tokens.shape == (2, 3, 4)
        assert first.tokens.dtype == torch.int64
        if documents:
            assert [batch.documents.unique().tolist() for batch in (first, second)] == [[1], [2]]
        else:
            assert first.documents is second.documents is None


def test_closing_ends_the_reading() -> None:
    stream = Told()
    feed = fed(stream, ProcessGroups.single())
    feed.next()
    feed.close()
    assert feed.prefetcher is not None
    assert not any(thread.is_alive() for thread in feed.prefetcher._worker._threads)
    fed(None, ProcessGroups.single()).close()  # a rank that reads nothing has nothing to end


def what_each_is_handed(groups: ProcessGroups) -> tuple[list[int], bool, dict[int, LaneState], int]:
    """Ids, whether there is a digest, states, and the next sample, of the second batch."""
    feed = fed(Told() if groups.model.rank == 0 else None, groups, documents=True)
    feed.next()
    batch = feed.next()
    feed.close()
    assert batch.documents is not None
    assert batch.documents.tolist() == [[[2] * 4] * 3] * 2
    return batch.tokens.unique().tolist(), batch.digest is not None, dict(batch.states), batch.next_sample


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(context=2), Layout(pipeline=2)], ids=str)
def test_every_rank_of_a_model_has_the_batch_and_the_one_that_reads_its_place_in_the_data(
    ranks: RankPool, layout: Layout
) -> None:
    reader, other = ranks.run(layout, what_each_is_handed)
    place = LaneState(DataPosition(0, 2, 4, 6), documents=14)
    assert reader == ([2], True, {5: place}, 12)
    assert other == ([2], False, {}, 0)


def until_the_data_ends(groups: ProcessGroups, problem: str) -> tuple[int, str]:
    """How many batches came, and what was raised then."""
    feed = fed(Told(2, DataError(problem)) if groups.model.rank == 0 else None, groups)
    taken = 0
    try:
        while True:
            feed.next()
            taken += 1
    except DataError as error:
        return taken, str(error)
    finally:
        feed.close()


def test_data_that_cannot_be_read_on_is_told_in_its_turn_and_to_every_rank_of_the_model(ranks: RankPool) -> None:
    problem = "shard 'part-1.parquet' row group 3 is damaged"
    for layout in (Layout(), Layout(tensor=3)):
        assert ranks.run(layout, until_the_data_ends, problem) == [(2, problem)] * layout.world_size


def test_an_error_that_is_not_of_the_data_reaches_the_rank_that_reads_as_it_is() -> None:
    error = ZeroDivisionError("a fault of the reader itself")
    feed = fed(Told(1, error), ProcessGroups.single())
    feed.next()
    with pytest.raises(ZeroDivisionError) as raised:
        feed.next()
    assert raised.value is error
    feed.close()
