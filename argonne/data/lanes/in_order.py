"""Lanes of a run that goes on where another had read the shards one after the other, row by row.

A lane visits its units in the order of the corpus, so that every row has a side: what lies before the place was read,
whichever lane would have had it, and each lane goes on with its first unit from there on. No row is left out of the
pass and none comes twice. What differs is the order of what comes: from here on lanes go through it side by side.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from argonne.data.corpus.shards import OnBad, Shard
from argonne.data.lanes.plan import LanePlan, Place
from argonne.data.lanes.reader import DocumentReader
from argonne.data.lanes.state import LaneState
from argonne.data.tokens.filters import FILTERS, Filters


def lanes_from(
    shards: Sequence[Shard], lanes: int, epoch: int, shard: int, row: int, token: int = 0
) -> list[LaneState]:
    """The states of all lanes when of the pass ``epoch`` all that lies before a token has been read.

    Args:
        shards: of the corpus.
        lanes: of the run.
        epoch: passes that are complete.
        shard: the index of the shard.
        row: the row of that shard, which it has.
        token: the first token of that row's document that is to come.
    """
    plan = LanePlan(shards, lanes)
    place = _place(plan, shards, epoch, shard, row)
    states = []
    for lane in range(lanes):
        unit = place.unit + (lane + epoch - place.unit) % lanes
        if unit == place.unit:
            position = plan.position(place, token)
        elif unit < len(plan.units):
            position = plan.position(replace(place, unit=unit, row=plan.units[unit].first))
        else:
            position = plan.position(plan.enter(lane, epoch + 1))
        states.append(LaneState(position))
    return states


def document_length(
    shards: Sequence[Shard],
    shard: int,
    row: int,
    tokenizer: PreTrainedTokenizerFast,
    boundary: tuple[int, int] | None = None,
    on_bad: OnBad = "raise",
    filters: Filters = FILTERS,
) -> int:
    """Tokens of the document in a row of a shard; 0 if that row is none (see ``SequenceStream`` for the arguments).

    Raises:
        DataError: the row cannot be read, or there is no document at all from there on.
    """
    plan = LanePlan(shards, lanes=1)
    place = _place(plan, shards, 0, shard, row)
    reader = DocumentReader(shards, plan, tokenizer, boundary, on_bad, filters=filters)
    document = next(reader.documents(0, place))
    return len(document.tokens) if document.place == place else 0


def _place(plan: LanePlan, shards: Sequence[Shard], epoch: int, shard: int, row: int) -> Place:
    """The row of a shard, counted from its first, on the way of the lane that comes by it."""
    group = 0
    while row >= (rows := shards[shard].rows[group]):
        group, row = group + 1, row - rows
    wanted = (shard, group, row)
    return Place(epoch, bisect_right(plan.units, wanted, key=lambda u: (u.shard, u.row_group, u.end)), row)
