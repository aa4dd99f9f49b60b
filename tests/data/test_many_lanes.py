"""What a lane costs does not grow with the number of lanes. Nothing is timed: quadratic, these would take hours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import Assignment, BatchStream, DataPosition, LaneState, Mixture, Shard
from argonne.data.lanes.packing import Packed
from argonne.data.lanes.plan import LanePlan, Place

LANES = 200_000


def plan_of(rows: int, lanes: int) -> LanePlan:
    return LanePlan([Shard(Path("a"), (rows,), 1, "Parquet file")], lanes)


@given(st.integers(1, 9), st.integers(1, 40), st.data())
def test_a_lane_enters_at_its_first_unit_of_the_pass_or_of_the_first_later_one_that_has_any(rows, lanes, data) -> None:
    plan = plan_of(rows, lanes)
    lane, epoch = data.draw(st.integers(0, lanes - 1)), data.draw(st.integers(0, 100))
    later = next(e for e in range(epoch, epoch + lanes) if (lane + e) % lanes < len(plan.units))
    unit = (lane + later) % lanes
    assert plan.enter(lane, epoch) == Place(later, unit, plan.units[unit].first)


def test_each_of_many_lanes_finds_its_first_row_and_the_row_after_it() -> None:
    plan = plan_of(120, LANES)
    for lane in range(LANES):
        place = plan.enter(lane, epoch=1)
        after = plan.next_row(lane, place)
        assert plan.find(lane, plan.position(after, 0)) == after


class Counting:
    """A stream of lanes that counts how often a state is looked up."""

    block_size, lanes, served = 3, LANES, tuple(range(LANES))

    def __init__(self) -> None:
        self.delivered = dict.fromkeys(self.served, 0)
        self.looked_up = 0

    def next_sequence(self, lane: int) -> Packed:
        self.delivered[lane] += 4
        return Packed(np.full(4, lane, dtype=np.int64), np.zeros(4, dtype=np.int32))

    def state(self, lane: int) -> LaneState:
        self.looked_up += 1
        return LaneState(DataPosition(0, 0, 0, lane), tokens=self.delivered[lane])


def test_a_batch_looks_up_the_states_of_the_lanes_that_it_moved_and_tells_those_of_all() -> None:
    streams = [Counting(), Counting()]
    batches = BatchStream(Mixture(streams, (0.7, 0.3)), Assignment(micro_batch=5, accumulation=3))
    before = batches.next_batch().states
    assert sum(stream.looked_up for stream in streams) == 2 * LANES
    kept = dict(before)
    after = batches.next_batch().states
    assert sum(stream.looked_up for stream in streams) == 2 * LANES + 15
    assert before == kept, "what a batch tells is of that batch, whatever came after"
    for source, stream in enumerate(streams):
        assert [after[source * LANES + lane].tokens for lane in range(40)] == [stream.delivered[n] for n in range(40)]
    assert sum(state.tokens for state in after.values()) == 4 * 30
    assert list(after) == list(range(2 * LANES))
