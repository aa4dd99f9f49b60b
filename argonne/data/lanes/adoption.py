"""Going on with changed data, on purpose: each lane keeps its place where that place is still there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from argonne.data.corpus.inventory import describe, told_apart
from argonne.data.corpus.shards import Shard
from argonne.data.errors import DataError
from argonne.data.lanes.plan import LanePlan
from argonne.data.lanes.state import LaneState


def adopt(
    states: Sequence[LaneState], saved: Sequence[Mapping[str, Any]], shards: Sequence[Shard], same_tokens: bool
) -> tuple[list[LaneState], int]:
    """The lanes of a run as they go on in ``shards``, and how many of them keep their places.

    A lane keeps its place if the shard is unchanged and still on its way there; else it begins its pass over the
    data anew. What it delivered so far stays counted.

    Args:
        states: of all lanes, in lane order, as they were saved.
        saved: the listing of the shards then, as of ``describe``.
        same_tokens: whether documents still have the tokens that they had; if not, a lane begins anew with the
            document it was in.
    """
    plan = LanePlan(shards, len(states))
    places = {key: index for index, key in enumerate(_keys(describe(shards)))}
    moved = {index: places.get(key) for index, key in enumerate(_keys(saved))}
    adopted, kept = [], 0
    for lane, state in enumerate(states):
        unreadable = tuple(
            sorted((place, group) for shard, group in state.unreadable if (place := moved.get(shard)) is not None)
        )
        position = state.position
        index = moved.get(position.shard)
        try:
            if index is None:
                raise DataError("its shard is gone, or another")
            position = replace(position, shard=index, token=position.token if same_tokens else 0)
            plan.find(lane, position)
            kept += 1
        except DataError:
            position = plan.position(plan.enter(lane, position.epoch))
        adopted.append(replace(state, position=position, unreadable=unreadable))
    return adopted, kept


def _keys(listing: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    return told_apart([json.dumps(entry, sort_keys=True) for entry in listing])
