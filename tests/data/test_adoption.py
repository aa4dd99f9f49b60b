from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import LaneState, SequenceStream, Shard, describe
from argonne.data.lanes.adoption import adopt
from argonne.data.lanes.plan import UNITS_PER_LANE, LanePlan

LANES, BLOCK = 4, 15


def stream_of(shards, tokenizer, states=None) -> SequenceStream:
    return SequenceStream(shards, tokenizer, BLOCK, LANES, None, range(LANES), states)


def started(shards, tokenizer, steps: int = 5):
    stream = stream_of(shards, tokenizer)
    for _ in range(steps):
        for lane in range(LANES):
            stream.next_sequence(lane)
    return stream, [stream.state(lane) for lane in range(LANES)]


def test_shards_that_are_added_behind_the_others_leave_every_lane_at_its_place(shards_of, corpus_of, tokenizer) -> None:
    groups = [[6] * 8, [6] * 8]
    corpus = corpus_of([*groups, [6] * 4], seed=1)
    longer = shards_of(corpus)
    shorter = longer[:2]
    stream, states = started(shorter, tokenizer)
    adopted, kept = adopt(states, describe(shorter), longer, same_tokens=True)
    assert (adopted, kept) == (states, LANES)
    # Up to where the new shard comes in, the lanes deliver what they would have.
    continued = stream_of(longer, tokenizer, adopted)
    for lane in range(LANES):
        for _ in range(5):
            np.testing.assert_array_equal(
                continued.next_sequence(lane).tokens, stream.next_sequence(lane).tokens, f"lane {lane}"
            )


def plan_shards(rows: list[list[int]]) -> tuple[Shard, ...]:
    return tuple(Shard(Path(f"{n}.parquet"), tuple(each), 1, "Parquet file") for n, each in enumerate(rows))


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=6),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=3),
    st.integers(1, 9),
    st.data(),
)
def test_shards_added_behind_four_row_groups_a_lane_move_no_lane_and_fewer_move_those_that_are_counted(
    before, added, lanes, data
) -> None:
    old, new = plan_shards(before), plan_shards([*before, *added])
    then, now = LanePlan(old, lanes), LanePlan(new, lanes)
    states = []
    for lane in range(lanes):
        place = then.enter(lane, 0)
        for _ in range(data.draw(st.integers(0, 40))):
            place = then.next_row(lane, place)
        states.append(LaneState(then.position(place, token=0)))
    adopted, kept = adopt(states, describe(old), new, same_tokens=True)
    assert kept <= sum(one == other for one, other in zip(states, adopted, strict=True))
    if sum(map(len, before)) >= UNITS_PER_LANE * lanes:
        assert (adopted, kept) == (states, lanes)
    for lane, (one, other) in enumerate(zip(states, adopted, strict=True)):
        there = now.find(lane, other.position)
        assert one == other or there == now.enter(lane, one.position.epoch)


def test_a_lane_whose_shard_has_changed_begins_its_pass_anew_and_keeps_its_counts(
    shards_of, corpus_of, tokenizer
) -> None:
    corpus = corpus_of([[6] * 8, [6] * 8], seed=2)
    before = shards_of(corpus)
    _, states = started(before, tokenizer)
    corpus[0] = corpus[0][:-1]
    after = shards_of(corpus)
    adopted, kept = adopt(states, describe(before), after, same_tokens=True)
    assert kept == sum(state.position.shard == 1 for state in states)
    for lane, (old, new) in enumerate(zip(states, adopted, strict=True)):
        assert (new.tokens, new.documents, new.dropped) == (old.tokens, old.documents, old.dropped)
        if old.position.shard == 0:
            assert (new.position.epoch, new.position.row, new.position.token) == (old.position.epoch, 0, 0)
            stream_of(after, tokenizer, adopted).next_sequence(lane)


def test_with_another_tokenizer_a_lane_begins_the_document_it_was_in(shards_of, corpus_of, tokenizer) -> None:
    shards = shards_of(corpus_of([[6] * 8], seed=3))
    _, states = started(shards, tokenizer)
    adopted, kept = adopt(states, describe(shards), shards, same_tokens=False)
    assert kept == LANES
    assert any(state.position.token for state in states)
    for old, new in zip(states, adopted, strict=True):
        assert new.position.token == 0
        assert (new.position.shard, new.position.row_group, new.position.row) == (
            old.position.shard,
            old.position.row_group,
            old.position.row,
        )
    stream_of(shards, tokenizer, adopted).next_sequence(0)


def test_shards_of_the_same_name_size_and_rows_are_told_apart(shards_of, corpus_of, tokenizer) -> None:
    first, second = (shards_of(corpus_of([[8] * 2], seed=4)) for _ in range(2))
    twins = (*first, *second)
    assert describe(first) == describe(second)
    _, states = started(twins, tokenizer)
    assert {state.position.shard for state in states} == {0, 1}
    assert adopt(states, describe(twins), twins, same_tokens=True) == (states, LANES)
