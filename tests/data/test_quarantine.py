"""Shards and row groups that cannot be read: passed over alike by every layout and after every stop, and recorded."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import (
    Assignment,
    BatchStream,
    DataError,
    LaneState,
    SequenceStream,
    check_block_size,
    open_shards,
    quarantine,
    quarantined,
    read_texts,
)
from argonne.data.corpus import row_groups
from tests.data.files import spoil
from tests.data.strategies import run, seeds, shapes


def rebuilt(state: LaneState) -> LaneState:
    return LaneState.from_dict(json.loads(json.dumps(state.to_dict())))


BLOCK, LANES = 20, 4


def ranks(shards, tokenizer, size: int, states, sample: int, report=None) -> list[BatchStream]:
    assignment = Assignment(LANES // size, 1, size)
    streams = []
    for rank in range(size):
        served = assignment.served_lanes(rank, LANES)
        sequences = SequenceStream(shards, tokenizer, BLOCK, LANES, None, served, states, "skip", report)
        streams.append(BatchStream(sequences, assignment, rank, sample))
    return streams


@run(30)
@given(shapes(6, least_rows=1), seeds, st.data())
def test_damaged_row_groups_give_the_same_samples_and_states_at_any_layout_and_after_any_stop(
    shards_of, corpus_of, tokenizer, shape, seed, data
) -> None:
    corpus = corpus_of(shape, seed)
    shards = shards_of(corpus, ["parquet"])
    everything = [(shard, group) for shard, groups in enumerate(shape) for group in range(len(groups))]
    bad = data.draw(st.sets(st.sampled_from(everything[1:]))) if everything[1:] else set()
    for shard, group in bad:
        spoil(shards[shard].path, group)
    segments = data.draw(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4])), min_size=1, max_size=4))
    (whole,) = ranks(shards, tokenizer, 1, None, 0)
    states, sample = None, 0
    for steps, size in segments:
        reports: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            if data.draw(st.booleans()):  # read piece by piece, as large row groups are
                patch.setattr(row_groups, "STREAMED_BYTES", 0)
            streams = ranks(shards, tokenizer, size, states, sample, reports.append)
        for _ in range(steps):
            batches = [stream.next_batch() for stream in streams]
            expected = whole.next_batch()
            together = np.stack([batch.tokens[0] for batch in batches], axis=1).reshape(-1, BLOCK + 1)
            np.testing.assert_array_equal(together, expected.tokens[0])
            found = {lane: state for batch in batches for lane, state in batch.states.items()}
            assert found == expected.states
        states, sample = [rebuilt(found[lane]) for lane in range(LANES)], batches[0].step_sample
        assert len(reports) <= size * len(bad)
    assert {pair for state in states for pair in state.unreadable} <= bad


@run(30)
@given(shapes(6, least_rows=1), seeds, st.integers(1, 4), st.data())
def test_documents_and_drops_account_for_every_row_and_each_bad_row_group_is_reported_once(
    shards_of, corpus_of, tokenizer, shape, seed, lanes, data
) -> None:
    shards = shards_of(corpus_of(shape, seed), ["parquet"])
    everything = [(shard, group) for shard, groups in enumerate(shape) for group in range(len(groups))]
    bad = data.draw(st.sets(st.sampled_from(everything[1:]))) if everything[1:] else set()
    for shard, group in bad:
        spoil(shards[shard].path, group)
    reports: list[str] = []
    stream = SequenceStream(shards, tokenizer, 1, lanes, None, range(lanes), on_bad="skip", report=reports.append)
    rows = unreadable = 0
    for lane in range(lanes):
        before = state = stream.state(lane)
        while state.position.epoch < lanes:  # a lane meets every row in as many epochs
            before = state
            stream.next_sequence(lane)
            state = stream.state(lane)
        plan_rows = sum(map(sum, shape))
        # The last sequence may have gone on into the next pass.
        low = before.documents + sum(before.dropped.values())
        high = state.documents + sum(state.dropped.values())
        assert low <= plan_rows <= high
        assert set(state.unreadable) == bad
        rows += high
        unreadable += state.dropped.get("unreadable", 0)
    assert unreadable >= lanes * sum(shape[shard][group] for shard, group in bad)
    assert len(reports) == len(bad)
    for shard, group in bad:
        (line,) = [line for line in reports if f"row group {group} of shard {shards[shard].path} " in line]
        assert line.endswith(f"its {shape[shard][group]:,} rows are passed over (--on-bad-shard skip)")
        assert "\n" not in line


def test_by_default_a_bad_row_group_stops_the_run_and_is_named(shards_of, corpus_of, tokenizer) -> None:
    shards = shards_of(corpus_of([[8], [8, 8]], 1), ["parquet"])
    spoil(shards[1].path, 1)
    stream = SequenceStream(shards, tokenizer, BLOCK, 1, None, [0])
    with pytest.raises(DataError, match=f"row group 1 of shard {shards[1].path} cannot be read"):
        all(stream.next_sequence(0) for _ in range(1000))
    assert stream.state(0).unreadable == ()


def test_what_a_lane_could_not_read_stays_quarantined_for_it_when_it_becomes_readable(
    shards_of, corpus_of, tokenizer
) -> None:
    shards = shards_of(corpus_of([[8], [8], [8]], 2, rejected=0), ["parquet"])
    whole_file = shards[1].path.read_bytes()
    spoil(shards[1].path, 0)
    arguments = (shards, tokenizer, BLOCK, 1, None, [0])
    stream = SequenceStream(*arguments, on_bad="skip")
    while not stream.state(0).unreadable:
        stream.next_sequence(0)
    shards[1].path.write_bytes(whole_file)
    for on_bad in ("skip", "raise"):
        resumed = SequenceStream(*arguments, [rebuilt(stream.state(0))], on_bad)
        for _ in range(60):
            np.testing.assert_array_equal(stream.next_sequence(0).tokens, resumed.next_sequence(0).tokens)
            assert stream.state(0) == resumed.state(0)


def test_a_document_that_was_begun_and_can_no_longer_be_read_is_passed_over(shards_of, corpus_of, tokenizer) -> None:
    shards = shards_of(corpus_of([[4], [4]], 3, rejected=0), ["parquet"])
    arguments = (shards, tokenizer, BLOCK, 1, None, [0])
    stream = SequenceStream(*arguments)
    stream.next_sequence(0)
    state = stream.state(0)
    assert state.position.token
    spoil(shards[0].path, 0)
    resumed = SequenceStream(*arguments, [state], "skip")
    resumed.next_sequence(0)
    assert resumed.state(0).dropped == {"unreadable": 4 - state.documents}
    assert resumed.state(0).unreadable == ((0, 0),)
    assert resumed.state(0).position.shard == 1
    with pytest.raises(DataError, match="row group 0 of .* cannot be read"):
        SequenceStream(*arguments, [state]).next_sequence(0)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_corpus_of_which_nothing_can_be_read_is_refused_with_counts(lanes, shards_of, corpus_of, tokenizer) -> None:
    shards = shards_of(corpus_of([[8], [8]], 4), ["parquet"])
    for shard in shards:
        spoil(shard.path, 0)
    stream = SequenceStream(shards, tokenizer, BLOCK, lanes, None, range(lanes), on_bad="skip")
    with pytest.raises(DataError, match="no usable documents in the data; rows dropped: unreadable 16$"):
        stream.next_sequence(0)
    with pytest.raises(DataError, match="unreadable 16$"):
        check_block_size(shards, tokenizer, BLOCK, on_bad="skip")


def test_a_shard_that_cannot_be_opened_keeps_its_place_without_rows(shards_of, corpus_of, tokenizer, tmp_path) -> None:
    good = shards_of(corpus_of([[8], [8]], 5))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and nothing else")
    paths = [good[0].path, broken, good[1].path, tmp_path / "missing.arrow"]
    with pytest.raises(DataError, match="shard .*broken.parquet cannot be read"):
        open_shards(paths)
    shards = open_shards(paths, on_bad="skip")
    assert [shard.rows for shard in shards] == [(8,), (), (8,), ()]
    assert sorted(quarantined(shards)) == [1, 3]
    assert quarantined(shards)[1].startswith("cannot be read: ")
    stream = SequenceStream(shards, tokenizer, BLOCK, 2, None, range(2))
    plain = SequenceStream(good, tokenizer, BLOCK, 2, None, range(2))
    for step in range(20):
        np.testing.assert_array_equal(stream.next_sequence(step % 2).tokens, plain.next_sequence(step % 2).tokens)
    with pytest.raises(DataError, match=r"none of the 2 data shards can be read; shard .*broken.parquet cannot be"):
        open_shards(paths[1::2], on_bad="skip")


def test_ranks_agree_once_each_quarantines_what_any_of_them_could_not_open(shards_of, corpus_of) -> None:
    shards = shards_of(corpus_of([[8], [8], [8]], 6))
    here, there = quarantine(shards, {0: "is missing"}), quarantine(shards, {2: "is empty (0 bytes)"})
    union = {**quarantined(here), **quarantined(there)}
    assert quarantine(here, union) == quarantine(there, union)
    assert [shard.rows for shard in quarantine(here, union)] == [(), (8,), ()]
    assert [shard.rows for shard in quarantine(shards, union, keep_rows=True)] == [(8,)] * 3
    with pytest.raises(DataError, match="none of the 3 data shards can be read"):
        quarantine(shards, dict.fromkeys(range(3), "is missing"))
    with pytest.raises(DataError, match="row group 0 of shard .* cannot be read: the shard is missing"):
        read_texts(quarantine(shards, {1: "is missing"}, keep_rows=True)[1], 0)
