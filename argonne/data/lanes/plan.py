"""Canonical units: how the corpus is cut, and in which order each lane visits the pieces.

All of it follows from row counts and the number of lanes, never from who reads, so that the layout may change
at any restart without changing a single sample.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from argonne.data.corpus.row_groups import Unit
from argonne.data.corpus.shards import Shard
from argonne.data.errors import DataError
from argonne.data.lanes.state import DataPosition

MAX_DEFAULT_LANES = 64
# Fewer units than this per lane, and row groups are split: lanes would go through uneven shares.
UNITS_PER_LANE = 4


@dataclass(frozen=True, slots=True)
class Place:
    """A row on a lane's way: the pass it is on, the index of the unit, the row within the row group."""

    epoch: int
    unit: int
    row: int


def default_lanes(total_rows: int) -> int:
    """The largest power of two that is at most 64 and leaves each lane 8 rows or more (at least 1)."""
    most = min(MAX_DEFAULT_LANES, max(1, total_rows // 8))
    return 1 << (most.bit_length() - 1)


def cut_units(shards: Sequence[Shard], lanes: int) -> tuple[Unit, ...]:
    """The corpus in order, cut by row groups; into smaller ranges where these are too few for the lanes."""
    groups = [
        (index, group, rows) for index, shard in enumerate(shards) for group, rows in enumerate(shard.rows) if rows
    ]
    wanted = UNITS_PER_LANE * lanes
    total = sum(rows for *_, rows in groups)
    size = -(-total // wanted) if len(groups) < wanted else total
    return tuple(
        Unit(shard, group, first, min(first + size, rows))
        for shard, group, rows in groups
        for first in range(0, rows, size)
    )


class LanePlan:
    """The way of each lane through the units: in epoch e, lane l visits units i * lanes + (l + e) % lanes.

    Each unit is visited once per epoch, and each lane meets every unit within `lanes` epochs.
    """

    def __init__(self, shards: Sequence[Shard], lanes: int) -> None:
        if lanes < 1:
            raise DataError(f"lanes={lanes} is not a positive number")
        self.lanes = lanes
        self.units = cut_units(shards, lanes)
        if not self.units:
            raise DataError(f"the {len(shards)} data shards hold no rows")

    def enter(self, lane: int, epoch: int) -> Place:
        """The lane's first row in `epoch`; in a later one where there are too few units to give it any."""
        unit = (lane + epoch) % self.lanes
        if unit >= len(self.units):  # it moves up by one an epoch, and comes round to the first
            epoch, unit = epoch + self.lanes - unit, 0
        return Place(epoch, unit, self.units[unit].first)

    def next_unit(self, lane: int, place: Place) -> Place:
        """The first row of the unit that follows."""
        unit = place.unit + self.lanes
        if unit < len(self.units):
            return Place(place.epoch, unit, self.units[unit].first)
        return self.enter(lane, place.epoch + 1)

    def next_row(self, lane: int, place: Place) -> Place:
        """The row that follows, in this unit or the next."""
        row = place.row + 1
        if row < self.units[place.unit].end:
            return Place(place.epoch, place.unit, row)
        return self.next_unit(lane, place)

    def position(self, place: Place, token: int = 0) -> DataPosition:
        """What a checkpoint keeps of a place."""
        unit = self.units[place.unit]
        return DataPosition(place.epoch, unit.shard, unit.row_group, place.row, token)

    def row_group(self, place: Place) -> tuple[int, int]:
        """The (shard, row group) that a place is in."""
        unit = self.units[place.unit]
        return unit.shard, unit.row_group

    def find(self, lane: int, position: DataPosition) -> Place:
        """The inverse of `position`; raises DataError where the lane never comes by."""
        wanted = (position.shard, position.row_group, position.row)
        index = bisect_right(self.units, wanted, key=lambda u: (u.shard, u.row_group, u.first)) - 1
        if index >= 0 and index % self.lanes == (lane + position.epoch) % self.lanes:
            place = Place(position.epoch, index, position.row)
            if position.row < self.units[index].end and self.position(place, position.token) == position:
                return place
        raise DataError(
            f"data position {position.to_dict()} is not on the way of lane {lane} of {self.lanes}; "
            "the shards and the number of lanes must be those it was saved with"
        )
