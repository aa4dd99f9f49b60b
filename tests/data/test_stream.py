from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import (
    DataError,
    DataPosition,
    Encoder,
    LaneState,
    SequenceStream,
    check_block_size,
)
from argonne.data.corpus import row_groups
from argonne.data.lanes import reader
from argonne.data.lanes.reader import cut_batches
from tests.data.reference import Reference
from tests.data.strategies import boundaries, lane_counts, run, seeds, shapes

block_sizes = st.integers(1, 70)


def saved(state: LaneState) -> LaneState:
    """The state as a checkpoint gives it back."""
    return LaneState.from_dict(json.loads(json.dumps(state.to_dict())))


@run(60)
@given(shapes(8), seeds, lane_counts, block_sizes, boundaries)
def test_a_lane_delivers_every_token_of_its_documents_in_order_and_counts_each_row(
    shards_of, corpus_of, tokenizer, shape, seed, lanes, block_size, boundary
) -> None:
    corpus = corpus_of(shape, seed)
    reference = Reference(corpus, tokenizer, lanes, boundary)
    stream = SequenceStream(shards_of(corpus), tokenizer, block_size, lanes, boundary, range(lanes))
    for lane in range(lanes):
        sequences = [stream.next_sequence(lane).tokens for _ in range(300 // block_size + 1)]
        assert {(each.shape, each.dtype) for each in sequences} == {((block_size + 1,), np.dtype(np.int64))}
        delivered = np.concatenate(sequences).tolist()

        tokens: list[int] = []
        documents = 0
        dropped: Counter[str] = Counter()
        state = stream.state(lane)
        for position, outcome in reference.rows(lane):
            token = len(delivered) - len(tokens)
            if not token or (not isinstance(outcome, str) and token < len(outcome)):
                tokens += outcome[:token] if token else []
                expected = DataPosition(position.epoch, position.shard, position.row_group, position.row, token)
                break
            if isinstance(outcome, str):
                dropped[outcome] += 1
            else:
                documents += 1
                tokens += outcome
        assert delivered == tokens
        assert state == LaneState(expected, documents, len(delivered), dict(dropped))


@run(60)
@given(shapes(8), seeds, lane_counts, block_sizes, boundaries, st.data())
def test_resume_at_any_step_equals_the_uninterrupted_stream(
    shards_of, corpus_of, tokenizer, shape, seed, lanes, block_size, boundary, data
) -> None:
    arguments = (shards_of(corpus_of(shape, seed)), tokenizer, block_size, lanes, boundary, range(lanes))
    order = data.draw(st.lists(st.integers(0, lanes - 1), min_size=1, max_size=40))
    stops = data.draw(st.sets(st.integers(0, len(order)), max_size=6))
    whole = SequenceStream(*arguments)
    broken = SequenceStream(*arguments)
    for step, lane in enumerate(order):
        if step in stops:
            broken = SequenceStream(*arguments, [saved(broken.state(lane)) for lane in range(lanes)])
        np.testing.assert_array_equal(
            broken.next_sequence(lane).tokens, whole.next_sequence(lane).tokens, f"at step {step}"
        )
        assert broken.state(lane) == whole.state(lane)


@run(60)
@given(shapes(8), seeds, lane_counts, boundaries)
def test_one_epoch_delivers_the_tokens_of_every_accepted_document_exactly_once(
    shards_of, corpus_of, tokenizer, shape, seed, lanes, boundary
) -> None:
    corpus = corpus_of(shape, seed)
    reference = Reference(corpus, tokenizer, lanes, boundary)
    rows = [reference.outcome(text) for shard in corpus for group in shard for text in group]
    accepted = [tuple(outcome) for outcome in rows if not isinstance(outcome, str)]

    stream = SequenceStream(shards_of(corpus), tokenizer, 1, lanes, boundary, range(lanes))
    delivered: list[int] = []
    for lane in range(lanes):
        epoch_tokens = sum(
            len(outcome) for position, outcome in reference_epoch(reference, lane) if not isinstance(outcome, str)
        )
        sequences = [stream.next_sequence(lane).tokens for _ in range(ceil(epoch_tokens / 2))]
        # What is pending of the epoch after whole sequences is at most the half of one.
        delivered += [int(token) for pair in sequences for token in pair][:epoch_tokens]
    assert len(delivered) == sum(map(len, accepted))
    assert Counter(delivered) == Counter(token for document in accepted for token in document)


def reference_epoch(reference: Reference, lane: int) -> Iterator[tuple[DataPosition, str | list[int]]]:
    for position, outcome in reference.rows(lane):
        if position.epoch:
            return
        yield position, outcome


def test_the_size_of_tokeniser_batches_and_the_format_of_shards_change_nothing(
    shards_of, corpus_of, tokenizer, monkeypatch
) -> None:
    corpus = corpus_of([[60, 41], [30]], seed=1)
    results = []
    for rows, kinds in (("16", ["parquet"]), ("1000", ["file"]), ("23", ["stream", "parquet"])):
        monkeypatch.setenv("RESUME_TOKENIZER_BATCH_ROWS", rows)
        stream = SequenceStream(shards_of(corpus, kinds), tokenizer, 50, 3, None, range(3))
        results.append([stream.next_sequence(index % 3).tokens.tolist() for index in range(60)])
    assert results[0] == results[1] == results[2]


def test_a_lane_does_not_depend_on_which_others_are_served(shards_of, corpus_of, tokenizer) -> None:
    shards = shards_of(corpus_of([[20, 20]], seed=2))
    together = SequenceStream(shards, tokenizer, 30, 4, None, range(4))
    alone = SequenceStream(shards, tokenizer, 30, 4, None, [2])
    for index in range(40):
        together.next_sequence(index % 2)
        np.testing.assert_array_equal(alone.next_sequence(2).tokens, together.next_sequence(2).tokens)


def test_a_row_group_that_lanes_share_is_decoded_once_an_epoch_while_they_keep_step(
    shards_of, corpus_of, tokenizer, monkeypatch
) -> None:
    reads: list[tuple[int, int]] = []

    def counted(shard, row_group):
        reads.append((shard.path.name, row_group))
        return open_texts(shard, row_group)

    open_texts = row_groups.open_texts
    monkeypatch.setattr(row_groups, "open_texts", counted)
    stream = SequenceStream(shards_of(corpus_of([[64], [64]], 3, rejected=0)), tokenizer, 20, 8, None, range(8))
    while stream.state(0).position.epoch < 1:
        for lane in range(8):
            stream.next_sequence(lane)
    assert len(reads) == len(set(reads)) == 2


def test_documents_are_read_no_further_than_a_sequence_needs(shards_of, corpus_of, tokenizer, monkeypatch) -> None:
    sizes: list[int] = []

    class Counting(Encoder):
        def __call__(self, texts):
            sizes.append(len(texts))
            return super().__call__(texts)

    monkeypatch.setattr(reader, "shared_encoder", lambda tokenizer, fast: Counting(tokenizer, fast=fast, workers=1))
    monkeypatch.setenv("RESUME_TOKENIZER_BATCH_ROWS", "16")
    shards = shards_of(corpus_of([[500]], 4, rejected=0))
    stream = SequenceStream(shards, tokenizer, 20, 1, None, [0])
    stream.next_sequence(0)
    assert sizes in ([16], [16, 16])  # one list ahead


def test_an_untokenizable_document_is_counted_and_passed_over(shards_of, corpus_of, tokenizer, monkeypatch) -> None:
    shards = shards_of(corpus_of([[10]], 5, rejected=0))
    plain = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, texts: [None, *plain(self, texts)[1:]])
    stream = SequenceStream(shards, tokenizer, 200, 1, None, [0])
    while stream.state(0).position.epoch < 2:
        stream.next_sequence(0)
    # One for the first row of each unit that the lane went through: the corpus is cut in 4.
    assert stream.state(0).dropped["untokenizable"] >= 8


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_a_corpus_without_a_usable_document_is_refused_with_the_drop_counts(lanes, shards_of, tokenizer) -> None:
    shards = shards_of([[[None, "", "short one"], ["1" * 60]], [["#" * 60, "tiny"]]])
    counts = r"digits 1, empty 1, not_text 1, short 2, symbols 1$"
    stream = SequenceStream(shards, tokenizer, 8, lanes, None, range(lanes))
    for lane in range(lanes):
        before = stream.state(lane)
        with pytest.raises(DataError, match="no usable documents in the data; rows dropped: " + counts):
            stream.next_sequence(lane)
        assert stream.state(lane) == before
    with pytest.raises(DataError, match=counts):
        check_block_size(shards, tokenizer, 8)


@run(60)
@given(st.integers(1, 7), st.integers(0, 11), st.integers(1, 12))
def test_a_single_usable_document_is_enough_for_every_lane_and_every_resume(
    shards_of, tokenizer, lanes, at, block_size
) -> None:
    rows: list[object] = [None] * 12
    rows[at] = "baba condri elfan goist hulo mennor"
    arguments = (shards_of([[rows]]), tokenizer, block_size, lanes, None, range(lanes))
    whole, broken = SequenceStream(*arguments), SequenceStream(*arguments)
    for _ in range(12):
        for lane in range(lanes):
            np.testing.assert_array_equal(broken.next_sequence(lane).tokens, whole.next_sequence(lane).tokens)
        broken = SequenceStream(*arguments, [broken.state(lane) for lane in range(lanes)])


def test_a_state_from_other_lanes_or_another_tokenizer_is_refused(shards_of, corpus_of, tokenizer) -> None:
    shards = shards_of(corpus_of([[8, 8]], seed=6))
    stream = SequenceStream(shards, tokenizer, 30, 2, None, range(2))
    for lane in range(2):
        stream.next_sequence(lane)
    states = [stream.state(lane) for lane in range(2)]
    with pytest.raises(DataError, match="2 lane states were saved, and lanes=4"):
        SequenceStream(shards, tokenizer, 30, 4, None, range(4), states)
    with pytest.raises(DataError, match="not on the way of lane 0 of 2"):
        SequenceStream(shards, tokenizer, 30, 2, None, range(2), states[::-1])
    position = DataPosition(**{**states[0].position.to_dict(), "token": 10_000})
    resumed = SequenceStream(shards, tokenizer, 30, 2, None, [0], [LaneState(position), states[1]])
    with pytest.raises(DataError, match="'token': 10000.* of lane 0 is in no document"):
        resumed.next_sequence(0)


def test_block_size_and_served_lanes_are_checked(shards_of, corpus_of, tokenizer) -> None:
    shards = shards_of(corpus_of([[8]], seed=7))
    with pytest.raises(DataError, match="block_size=0"):
        SequenceStream(shards, tokenizer, 0, 2, None, [0])
    with pytest.raises(DataError, match=r"served=\[0, 2\] names lanes outside 0 to 1"):
        SequenceStream(shards, tokenizer, 8, 2, None, [0, 2])


@pytest.mark.parametrize("boundary", [None, (0, 2)])
def test_the_block_size_is_refused_exactly_when_the_corpus_has_fewer_tokens(
    boundary, shards_of, corpus_of, tokenizer
) -> None:
    corpus = corpus_of([[6, 5], [4]], seed=8)
    reference = Reference(corpus, tokenizer, 1, boundary)
    outcomes = [reference.outcome(text) for shard in corpus for group in shard for text in group]
    total = sum(len(outcome) for outcome in outcomes if not isinstance(outcome, str))
    shards = shards_of(corpus)
    check_block_size(shards, tokenizer, total - 1, boundary)
    with pytest.raises(DataError, match=rf"block_size={total} needs {total + 1} tokens .* holds only {total};"):
        check_block_size(shards, tokenizer, total, boundary)


def test_the_block_size_check_stops_reading_when_it_has_seen_enough(shards_of, tokenizer) -> None:
    source = random.Random(9)
    text = " ".join(source.choice(["baba", "elfan", "goist"]) for _ in range(30))
    shards = shards_of([[[text]], [[text]]])
    shards[1].path.unlink()
    check_block_size(shards, tokenizer, 20)
    with pytest.raises(DataError, match="cannot be read"):
        check_block_size(shards, tokenizer, 1000)


@given(st.lists(st.one_of(st.none(), st.integers(0, 12).map(lambda n: "x" * n)), max_size=30), st.integers(1, 6))
def test_batches_to_tokenise_are_bounded_in_rows_and_characters_and_lose_nothing(
    rows: list[str | None], most_rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("argonne.data.lanes.reader.BATCH_CHARACTERS", 10)
        batches = list(cut_batches(rows, most_rows))
    assert [row for batch in batches for row in batch] == rows
    for batch in batches:
        assert 1 <= len(batch) <= most_rows
        assert sum(len(row or "") for row in batch[:-1]) < 10
