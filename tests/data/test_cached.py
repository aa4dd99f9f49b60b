from __future__ import annotations

import json
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import (
    Assignment,
    Batch,
    BatchStream,
    CachedStream,
    DataError,
    DataPosition,
    LaneState,
    SequenceStream,
    build_cache,
    encode,
    open_cache,
)
from argonne.data.cache.permutation import Permutation
from argonne.data.tokens.filters import tokenise_rows
from tests.data.strategies import boundaries, lane_counts, layouts, run, seeds, shapes

# A corpus has at least one document, of at least 20 words.
block_sizes = st.integers(1, 19)


pytestmark = pytest.mark.usefixtures("small_units")


@pytest.fixture(scope="module")
def cache_of(shards_of, tokenizer, tmp_path_factory):
    def build(corpus, boundary=None):
        return build_cache(shards_of(corpus), tokenizer, boundary, tmp_path_factory.mktemp("caches"), progress=False)

    return build


class Reference:
    """The definition, with the whole corpus in memory and nothing clever."""

    def __init__(self, corpus, tokenizer, block_size: int, seed: int, boundary=None) -> None:
        self.length = block_size + 1
        self.seed = seed
        self.circle: list[tuple[int, tuple[int, ...]]] = []
        """Each token, and its shard, row group, row and place in its document."""
        self.dropped: Counter[str] = Counter()
        for shard, groups in enumerate(corpus):
            for group, texts in enumerate(groups):
                for row, text in enumerate(texts):
                    (outcome,) = tokenise_rows([text], lambda batch: encode(tokenizer, batch), boundary)
                    if isinstance(outcome, str):
                        self.dropped[outcome] += 1
                        continue
                    self.circle += [(token, (shard, group, row, place)) for place, token in enumerate(outcome.tolist())]

    def windows(self, epoch: int) -> list[int]:
        """Numbers of the windows that start in this pass, unshuffled."""
        size = len(self.circle)
        numbers = range(epoch * size // self.length, (epoch + 1) * size // self.length + 2)
        return [number for number in numbers if epoch * size <= number * self.length < (epoch + 1) * size]

    def order(self, count: int) -> list[tuple[int, int]]:
        """Epoch and window of the first sequences of the run."""
        found: list[tuple[int, int]] = []
        epoch = 0
        while len(found) < count:
            windows = self.windows(epoch)
            place = Permutation(len(windows), self.seed, epoch) if windows else None
            found += [(epoch, windows[place(index)]) for index in range(len(windows))]
            epoch += 1
        return found[:count]

    def places(self, window: int) -> list[tuple[int, int]]:
        """Pass and place on the circle of each token of a window."""
        return [divmod(window * self.length + offset, len(self.circle)) for offset in range(self.length)]

    def tokens(self, window: int) -> list[int]:
        return [self.circle[place][0] for _, place in self.places(window)]

    def documents(self, window: int) -> list[int]:
        of_token = [(turn, self.circle[place][1][:3]) for turn, place in self.places(window)]
        return [number for number, (_, same) in enumerate(groupby(of_token)) for _ in same]

    def ended(self, window: int) -> int:
        following = [(place + 1) % len(self.circle) for _, place in self.places(window)]
        return sum(self.circle[place][1][3] == 0 for place in following)


def saved(state: LaneState) -> LaneState:
    """The state as a checkpoint gives it back."""
    return LaneState.from_dict(json.loads(json.dumps(state.to_dict())))


@run(25)
@given(shapes(8), seeds, lane_counts, block_sizes, boundaries)
def test_sequences_and_states_are_those_of_the_definition(
    cache_of, corpus_of, tokenizer, shape, seed, lanes, block_size, boundary
) -> None:
    corpus = corpus_of(shape, seed)
    reference = Reference(corpus, tokenizer, block_size, seed, boundary)
    stream = CachedStream(cache_of(corpus, boundary), block_size, lanes, range(lanes), seed)
    size = len(reference.circle)
    # Three passes at least, a bounded number of sequences.
    count = min(3 * size // reference.length, 400) + 2 * lanes
    order = reference.order(count + lanes)
    documents = [0] * lanes
    for number in range(count):
        lane, (epoch, window) = number % lanes, order[number]
        packed = stream.next_sequence(lane)
        assert packed.tokens.tolist() == reference.tokens(window)
        assert packed.documents.tolist() == reference.documents(window)
        assert (packed.tokens.dtype, packed.documents.dtype) == (np.dtype(np.int64), np.dtype(np.int32))
        documents[lane] += reference.ended(window)
        next_epoch, next_window = order[number + lanes]
        begun = {reason: rows * (epoch + 1) for reason, rows in reference.dropped.items()}
        assert stream.state(lane) == LaneState(
            DataPosition(next_epoch, *reference.circle[next_window * reference.length % size][1]),
            documents[lane],
            (number // lanes + 1) * reference.length,
            begun if lane == 0 else {},
        )


@run(25)
@given(shapes(8), seeds, block_sizes, st.integers(1, 4))
def test_every_epoch_delivers_each_of_its_windows_once_and_k_epochs_each_token_k_times(
    cache_of, corpus_of, tokenizer, shape, seed, block_size, epochs
) -> None:
    corpus = corpus_of(shape, seed)
    reference = Reference(corpus, tokenizer, block_size, seed)
    built = cache_of(corpus)
    stream = CachedStream(built, block_size, 1, [0], seed)
    size, length = len(reference.circle), reference.length
    delivered: Counter[tuple[int, ...]] = Counter()
    for epoch in range(epochs):
        expected = Counter(tuple(reference.tokens(window)) for window in reference.windows(epoch))
        found = Counter(tuple(stream.next_sequence(0).tokens.tolist()) for _ in range(expected.total()))
        assert found == expected, f"epoch {epoch}"
        delivered += found
    assert delivered.total() == -(-epochs * size // length)
    # What the last window takes of the pass after is all that there is beside the passes.
    beyond = delivered.total() * length - epochs * size
    assert 0 <= beyond < length
    tokens = Counter(token for window, times in delivered.items() for token in window * times)
    once = Counter(token for token, _ in reference.circle)
    assert tokens == Counter({token: epochs * count for token, count in once.items()}) + Counter(
        token for token, _ in reference.circle[:beyond]
    )


@run(25)
@given(shapes(8), seeds, lane_counts, block_sizes, boundaries, st.data())
def test_resume_at_any_step_equals_the_uninterrupted_stream(
    cache_of, corpus_of, shape, seed, lanes, block_size, boundary, data
) -> None:
    built = cache_of(corpus_of(shape, seed), boundary)
    arguments = (built, block_size, lanes, range(lanes), seed)
    order = data.draw(st.lists(st.integers(0, lanes - 1), min_size=1, max_size=40))
    stops = data.draw(st.sets(st.integers(0, len(order)), max_size=6))
    whole, broken = CachedStream(*arguments), CachedStream(*arguments)
    for step, lane in enumerate(order):
        if step in stops:
            reopened = (open_cache(built.path, verify=True), *arguments[1:])
            broken = CachedStream(*reopened, [saved(broken.state(lane)) for lane in range(lanes)])
        one, other = broken.next_sequence(lane), whole.next_sequence(lane)
        np.testing.assert_array_equal(one.tokens, other.tokens, f"at step {step}")
        np.testing.assert_array_equal(one.documents, other.documents, f"at step {step}")
        assert broken.state(lane) == whole.state(lane)


LANES, BLOCK = 4, 12


def global_order(batches: list[Batch], start: int) -> list[np.ndarray]:
    """Sample k is with rank k % dp_size, in the order of that rank's micro-batches."""
    queues = [iter(batch.tokens.reshape(-1, BLOCK + 1)) for batch in batches]
    total = sum(batch.tokens.shape[0] * batch.tokens.shape[1] for batch in batches)
    return [next(queues[sample % len(batches)]) for sample in range(start, start + total)]


@run(25)
@given(st.lists(layouts, min_size=1, max_size=4))
def test_the_global_order_is_the_same_through_any_change_of_layout_and_batch_size(
    cache_of, corpus_of, tokenizer, segments
) -> None:
    corpus = corpus_of([[9, 7], [12, 3, 5]], seed=1)
    built = cache_of(corpus)
    samples: list[np.ndarray] = []
    states: list[LaneState] | None = None
    for steps, dp_size, micro_batch, accumulation in segments:
        assignment = Assignment(micro_batch, accumulation, dp_size)
        ranks = []
        for rank in range(dp_size):
            served = assignment.served_lanes(rank, LANES)
            stream = CachedStream(built, BLOCK, LANES, served, 3, states)
            ranks.append(BatchStream(stream, assignment, rank, len(samples)))
        for _ in range(steps):
            batches = [rank.next_batch() for rank in ranks]
            samples += global_order(batches, len(samples))
        found = {lane: state for batch in batches for lane, state in batch.states.items()}
        states = [saved(found[lane]) for lane in range(LANES)]
    reference = Reference(corpus, tokenizer, BLOCK, seed=3)
    expected = [reference.tokens(window) for _, window in reference.order(len(samples))]
    assert [sample.tolist() for sample in samples] == expected


def test_another_seed_is_another_order_of_the_same_windows(cache_of, corpus_of) -> None:
    built = cache_of(corpus_of([[20, 20]], seed=2))
    epoch = -(-built.tokens // 9)
    orders = []
    for seed in (0, 1):
        stream = CachedStream(built, 8, 1, [0], seed)
        orders.append([tuple(stream.next_sequence(0).tokens.tolist()) for _ in range(2 * epoch)])
    assert orders[0][:epoch] != orders[1][:epoch]
    assert sorted(orders[0][:epoch]) == sorted(orders[1][:epoch])
    assert orders[0][:epoch] != orders[0][epoch:]


@pytest.mark.parametrize("documents", [1, 2])
def test_a_sequence_as_long_as_the_corpus_begins_new_documents_at_the_wrap(cache_of, tokenizer, documents) -> None:
    text = "baba condri elfan goist hulo mennor"
    corpus = [[[None, *[text] * documents, ""]]]
    built = cache_of(corpus)
    block_size = built.tokens - 2
    stream = CachedStream(built, block_size, 2, range(2), seed=0)
    reference = Reference(corpus, tokenizer, block_size, seed=0)
    order = [window for _, window in reference.order(30)]
    for number, window in enumerate(order):
        packed = stream.next_sequence(number % 2)
        assert packed.tokens.tolist() == reference.tokens(window)
        assert packed.documents.tolist() == reference.documents(window)
    longest = CachedStream(built, built.tokens - 1, 1, [0], 0)
    first, second = longest.next_sequence(0), longest.next_sequence(0)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert longest.state(0).documents == 2 * documents


def test_the_block_size_is_refused_when_the_corpus_has_fewer_tokens_and_with_drop_counts_when_none(
    cache_of, corpus_of
) -> None:
    built = cache_of(corpus_of([[6, 5], [4]], seed=8))
    total = built.tokens
    CachedStream(built, total - 1, 1, [0], 0)
    with pytest.raises(DataError, match=rf"block_size={total} needs {total + 1} tokens .* holds only {total};"):
        CachedStream(built, total, 1, [0], 0)
    empty = cache_of([[[None, "", "short one"], ["1" * 60]]])
    with pytest.raises(DataError, match=r"no usable documents .*: digits 1, empty 1, not_text 1, short 1$"):
        CachedStream(empty, 1, 1, [0], 0)


def test_sizes_and_served_lanes_are_checked(cache_of, corpus_of) -> None:
    built = cache_of(corpus_of([[8]], seed=7))
    for arguments, message in (
        ((0, 2, [0]), "block_size=0"),
        ((8, 0, []), "lanes=0"),
        ((8, 2, [0, 2]), r"served=\[0, 2\] names lanes outside 0 to 1"),
    ):
        with pytest.raises(DataError, match=message):
            CachedStream(built, *arguments, 0)


def test_a_state_of_another_seed_block_size_lanes_or_of_streaming_is_refused(
    cache_of, shards_of, corpus_of, tokenizer
) -> None:
    corpus = corpus_of([[30, 30]], seed=6)
    built = cache_of(corpus)
    stream = CachedStream(built, 12, 2, range(2), 5)
    for number in range(10):
        stream.next_sequence(number % 2)
    states = [saved(stream.state(lane)) for lane in range(2)]
    CachedStream(built, 12, 2, range(2), 5, states)
    refused = "is not where 65 tokens lead to; data, tokenizer, block size, lanes and seed must be"
    for block_size, seed, kept in ((12, 6, states), (11, 5, states), (4, 5, states), (12, 5, states[::-1])):
        with pytest.raises(DataError, match=refused):
            CachedStream(built, block_size, 2, range(2), seed, kept)
    with pytest.raises(DataError, match="2 lane states were saved, and lanes=4"):
        CachedStream(built, 12, 4, range(4), 5, states)
    streaming = SequenceStream(shards_of(corpus), tokenizer, 12, 2, None, range(2))
    for number in range(10):
        streaming.next_sequence(number % 2)
    with pytest.raises(DataError, match=refused):
        CachedStream(built, 12, 2, range(2), 5, [streaming.state(lane) for lane in range(2)])


def test_a_cache_whose_files_went_away_is_said_in_one_line_and_no_sequence_is_counted(cache_of, corpus_of) -> None:
    built = cache_of(corpus_of([[20, 20, 20]], seed=9))
    stream = CachedStream(built, 10, 1, [0], 0)
    for unit in built.units:
        (built.path / f"{unit.span.name}.bin").unlink()
    with pytest.raises(DataError, match="token cache .* cannot be read: .*No such file") as caught:
        stream.next_sequence(0)
    assert "\n" not in str(caught.value)
