from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import DataError, DataPosition, LaneState, Shard, default_lanes
from argonne.data.lanes.plan import LanePlan, Place, cut_units

row_counts = st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=4).filter(
    lambda shards: any(map(sum, shards))
)
lane_counts = st.integers(1, 9)


def shards_with(rows: list[list[int]]) -> list[Shard]:
    return [Shard(Path(f"{index}.parquet"), tuple(groups), 1, "Parquet file") for index, groups in enumerate(rows)]


def way(plan: LanePlan, lane: int, epochs: int) -> list[Place]:
    """Every row that the lane passes in its first epochs."""
    places = []
    place = plan.enter(lane, 0)
    while place.epoch < epochs:
        places.append(place)
        place = plan.next_row(lane, place)
    return places


@pytest.mark.parametrize(
    ("rows", "lanes"), [(0, 1), (15, 1), (16, 2), (31, 2), (32, 4), (511, 32), (512, 64), (10**9, 64)]
)
def test_default_lanes_leave_eight_rows_or_more_to_each(rows: int, lanes: int) -> None:
    assert default_lanes(rows) == lanes


@given(row_counts, lane_counts)
def test_units_cover_every_row_once_in_order(rows: list[list[int]], lanes: int) -> None:
    covered = [
        (unit.shard, unit.row_group, row)
        for unit in cut_units(shards_with(rows), lanes)
        for row in range(unit.first, unit.end)
    ]
    assert covered == [
        (shard, group, row)
        for shard, groups in enumerate(rows)
        for group, count in enumerate(groups)
        for row in range(count)
    ]


def test_row_groups_are_units_when_there_are_four_for_each_lane_and_are_split_when_not() -> None:
    plenty = cut_units(shards_with([[100] * 8]), lanes=2)
    assert [(unit.first, unit.end) for unit in plenty] == [(0, 100)] * 8
    few = cut_units(shards_with([[100] * 7]), lanes=2)
    assert {unit.end - unit.first for unit in few} == {88, 12}
    assert len(cut_units(shards_with([[3]]), lanes=4)) == 3


@given(row_counts, lane_counts)
def test_each_epoch_visits_every_row_in_exactly_one_lane(rows: list[list[int]], lanes: int) -> None:
    plan = LanePlan(shards_with(rows), lanes)
    places = [place for lane in range(lanes) for place in way(plan, lane, epochs=3)]
    per_epoch = [sorted((p.unit, p.row) for p in places if p.epoch == epoch) for epoch in range(3)]
    everything = [(index, row) for index, unit in enumerate(plan.units) for row in range(unit.first, unit.end)]
    assert per_epoch == [everything] * 3


@given(row_counts, lane_counts)
def test_each_lane_meets_every_row_within_as_many_epochs_as_there_are_lanes(rows, lanes: int) -> None:
    plan = LanePlan(shards_with(rows), lanes)
    for lane in range(lanes):
        assert len(way(plan, lane, epochs=lanes)) == sum(map(sum, rows))


@given(row_counts, lane_counts, st.data())
def test_a_position_leads_back_to_its_place_and_only_in_its_own_lane(rows, lanes: int, data) -> None:
    plan = LanePlan(shards_with(rows), lanes)
    lane = data.draw(st.integers(0, lanes - 1))
    place = data.draw(st.sampled_from(way(plan, lane, epochs=lanes)))
    position = plan.position(place, token=3)
    assert plan.find(lane, position) == place
    for other in set(range(lanes)) - {lane}:
        with pytest.raises(DataError, match=f"not on the way of lane {other} of {lanes}"):
            plan.find(other, position)


@pytest.mark.parametrize(
    "position",
    [(0, 1, 0, 0, 0), (0, 0, 2, 0, 0), (0, 0, 1, 4, 0), (0, 0, 0, 3, 0)],
    ids=["shard", "row_group", "row", "past_the_first_group"],
)
def test_a_position_outside_the_corpus_is_refused(position: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="not on the way of lane 0 of 1"):
        LanePlan(shards_with([[3, 4]]), lanes=1).find(0, DataPosition(*position))


def test_lanes_must_be_positive_and_the_corpus_must_have_rows() -> None:
    with pytest.raises(DataError, match="lanes=0 is not a positive number"):
        LanePlan(shards_with([[3]]), lanes=0)
    with pytest.raises(DataError, match="2 data shards hold no rows"):
        LanePlan(shards_with([[0], []]), lanes=1)


STATE = LaneState(DataPosition(1, 2, 3, 4, 5), documents=6, tokens=7, dropped={"short": 8})


def test_a_lane_state_survives_its_dictionary() -> None:
    assert LaneState.from_dict(STATE.to_dict()) == STATE
    assert LaneState.from_dict(LaneState(STATE.position).to_dict()) == LaneState(STATE.position)
    bad = replace(STATE, unreadable=((0, 3), (2, 1)))
    assert LaneState.from_dict(json.loads(json.dumps(bad.to_dict()))) == bad


def test_a_lane_state_from_before_there_was_a_quarantine_is_accepted() -> None:
    old = STATE.to_dict()
    del old["unreadable"]
    assert LaneState.from_dict(old) == STATE


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": -1},
        {"documents": "6"},
        {"dropped": {"short": 0.5}},
        {"dropped": None},
        {"unreadable": None},
        {"unreadable": [1]},
        {"unreadable": [[1, -1]]},
        {"unreadable": [[1, 2, 3]]},
        {"extra": 1},
        {"position": None},
        {"position": {"epoch": 1}},
        {"position": {**STATE.position.to_dict(), "row": 1.5}},
        {"position": {**STATE.position.to_dict(), "row": True}},
    ],
    ids=str,
)
def test_a_dictionary_that_is_not_a_lane_state_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(DataError, match="does not have the fields|not a whole number|not a count|not a list"):
        LaneState.from_dict({**STATE.to_dict(), **change})
