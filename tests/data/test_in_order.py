"""Lanes that go on where shards had been read in their order leave no row out, and read none again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import open_shards, train_tokenizer
from argonne.data.lanes.in_order import document_length, lanes_from
from argonne.data.lanes.plan import LanePlan
from tests.data.test_units import lane_counts, row_counts, shards_with


@given(row_counts, lane_counts, st.integers(0, 12), st.data())
def test_each_row_from_the_place_on_is_read_once_in_the_pass_and_no_other(
    rows: list[list[int]], lanes: int, epoch: int, data: st.DataObject
) -> None:
    shards = shards_with(rows)
    every = [(shard, row) for shard, groups in enumerate(rows) for row in range(sum(groups))]
    at = data.draw(st.integers(0, len(every) - 1))
    plan, read = LanePlan(shards, lanes), Counter[tuple[int, int]]()
    states = lanes_from(shards, lanes, epoch, *every[at], token=7)
    assert sorted(state.position.token for state in states) == [0] * (lanes - 1) + [7]
    for lane, state in enumerate(states):
        place = plan.find(lane, state.position)
        while place.epoch == epoch:
            shard, group = plan.row_group(place)
            read[shard, sum(rows[shard][:group]) + place.row] += 1
            place = plan.next_row(lane, place)
    assert read == Counter(every[at:])


def test_a_row_has_the_tokens_that_a_lane_reads_of_it(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some words and more of them"] * 9)
    texts = [["some words and more of them"] * 3, [None, "of", " ".join(["some words"] * 12)]]
    for shard, each in enumerate(texts):
        pq.write_table(pa.table({"text": each}), tmp_path / f"part-{shard}.parquet", row_group_size=2)
    shards = open_shards(sorted(tmp_path.iterdir()))
    for row, text in enumerate(texts[1]):
        ids = [] if row < 2 else tokenizer.encode(text, add_special_tokens=False)
        assert document_length(shards, 1, row, tokenizer) == len(ids)
        assert document_length(shards, 1, row, tokenizer, (0, 2)) == len(ids) + 2 * bool(ids)
