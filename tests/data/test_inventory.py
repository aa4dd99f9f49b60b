from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from argonne.data import (
    DataError,
    LaneState,
    SequenceStream,
    Shard,
    changes,
    describe,
    fingerprint,
    open_shards,
    quarantined,
    restore,
)


def shard(name: str, *rows: int, size: int = 10) -> Shard:
    return Shard(Path(name), rows, size, "Parquet file")


def kept(shards) -> list[dict[str, object]]:
    """The listing as a checkpoint gives it back."""
    return json.loads(json.dumps(describe(shards)))


def test_a_listing_is_short_and_has_no_changes_to_its_own_shards() -> None:
    shards = [shard(f"part-{index:05}.parquet", *[1000] * 99, 734 + index, size=10**9) for index in range(250)]
    assert len(json.dumps(describe(shards))) < 25_000
    assert changes(kept(shards), kept(shards)) == []
    elsewhere = [Shard(Path("/other") / each.path.name, each.rows, each.size, each.format) for each in shards]
    assert changes(kept(shards), kept(elsewhere)) == []


def test_changes_are_told_in_words() -> None:
    before = kept([shard("a", 600, 600), shard("b", 5), shard("c", 5), shard("d", 2, 3)])
    after = [shard("a", 600, 500), shard("b", 5, size=1234), shard("d", 3, 2), shard("e", 7)]
    assert changes(before, kept(after)) == [
        "shard a: 1,200 rows in 2 row groups -> 1,100 rows in 2 row groups",
        "shard b: 10 bytes -> 1,234 bytes",
        "shard c was removed (5 rows in 1 row group)",
        "shard d: 5 rows in 2 row groups, cut in other places",
        "shard e was added (7 rows in 1 row group)",
    ]


def test_another_order_and_long_lists() -> None:
    shards = [shard(f"{index}", 5) for index in range(10)]
    assert changes(kept(shards), kept(shards[::-1])) == ["the shards come in another order: 9 before 0"]
    lines = changes(kept(shards), [])
    assert lines[4:] == ["shard 4 was removed (5 rows in 1 row group)", "and 5 more changes"]


def test_shards_of_one_name_in_several_directories_are_told_apart_by_their_order() -> None:
    before = [shard("x/1", 5), shard("y/1", 6), shard("z/1", 7)]
    assert changes(kept(before), kept(before)) == []
    assert changes(kept(before), kept(before[:2])) == ["shard 1 was removed (7 rows in 1 row group)"]


@pytest.mark.parametrize(
    "damage", [[1], [{}], None, [{"name": "a", "size": -1, "rows": []}], [{"name": "a", "size": 1, "rows": 3}]]
)
def test_a_damaged_listing_is_refused(damage) -> None:
    for use in (lambda: changes(damage, []), lambda: restore(damage, [])):
        with pytest.raises(DataError, match="listing of the data shards is damaged"):
            use()


@pytest.fixture
def corpus(shards_of, corpus_of):
    return shards_of(corpus_of([[8, 8], [9], [8], [10, 3]], seed=1, rejected=0), ["parquet"])


def test_unchanged_shards_are_restored_as_they_were(corpus) -> None:
    paths = [each.path for each in corpus]
    for on_bad in ("raise", "skip"):
        assert restore(kept(corpus), paths, on_bad) == corpus


def test_lanes_keep_their_ways_when_shards_are_lost_or_cut_short(corpus, tokenizer) -> None:
    stream = SequenceStream(corpus, tokenizer, 20, 2, None, [0, 1])
    for step in range(4):
        stream.next_sequence(step % 2)
    listing, states = kept(corpus), [LaneState.from_dict(stream.state(lane).to_dict()) for lane in range(2)]
    paths = [each.path for each in corpus]
    paths[1].unlink()
    paths[3].write_bytes(paths[3].read_bytes()[:-30])
    paths.remove(paths[1])
    with pytest.raises(DataError, match=r"shard shard-1.bin is missing \(9 rows in 1 row group\)"):
        restore(listing, paths)
    shards = restore(listing, paths, "skip")
    assert [(each.path.name, each.rows, each.size) for each in shards] == [
        (each.path.name, each.rows, each.size) for each in corpus
    ]
    assert quarantined(shards)[1] == "is missing"
    assert quarantined(shards)[3].startswith("cannot be read: ")
    assert fingerprint(shards) == fingerprint(corpus)
    assert changes(listing, kept(shards)) == []
    assert kept(shards) == listing
    reports: list[str] = []
    resumed = SequenceStream(shards, tokenizer, 20, 2, None, [0, 1], states, "skip", reports.append)
    while min(resumed.state(lane).position.epoch for lane in range(2)) < 3:
        for lane in range(2):
            resumed.next_sequence(lane)
    for lane in range(2):
        assert set(resumed.state(lane).unreadable) == {(1, 0), (3, 0), (3, 1)}
    assert len(reports) == 3
    assert any("row group 0 of shard shard-1.bin cannot be read: the shard is missing;" in line for line in reports)


def test_a_shard_quarantined_from_the_start_stays_so_when_it_becomes_readable(corpus, tmp_path: Path) -> None:
    good = shutil.copy(corpus[1].path, tmp_path / "copy")
    corpus[1].path.write_bytes(b"nothing")
    paths = [each.path for each in corpus]
    shards = open_shards(paths, "skip")
    listing = kept(shards)
    shutil.copy(good, corpus[1].path)
    for on_bad in ("raise", "skip"):
        again = restore(listing, paths, on_bad)
        assert again == shards
        assert changes(listing, kept(again)) == []


def test_shards_that_are_new_come_after_those_listed(corpus) -> None:
    listing = kept(corpus[1:3])
    shards = restore(listing, [each.path for each in corpus])
    assert [each.path.name for each in shards] == ["shard-1.bin", "shard-2.bin", "shard-0.bin", "shard-3.bin"]
    assert len(changes(listing, kept(shards))) == 2


def test_a_corpus_that_is_gone_is_refused(corpus) -> None:
    with pytest.raises(DataError, match="none of the 4 data shards can be read; shard shard-0.bin is missing"):
        restore(kept(corpus), [], "skip")


def test_arrays_of_resumed_lanes_equal_the_uninterrupted_ones_with_a_shard_missing_from_the_start(
    corpus, tokenizer
) -> None:
    listing = kept(corpus)
    corpus[2].path.unlink()
    paths = [each.path for each in corpus if each.path.exists()]
    arguments = (restore(listing, paths, "skip"), tokenizer, 20, 2, None, [0, 1])
    whole, broken = (SequenceStream(*arguments, on_bad="skip") for _ in range(2))
    for step in range(60):
        lane = step % 2
        np.testing.assert_array_equal(whole.next_sequence(lane).tokens, broken.next_sequence(lane).tokens)
        assert whole.state(lane) == broken.state(lane)
        if step % 7 == 0:
            states = [LaneState.from_dict(json.loads(json.dumps(broken.state(n).to_dict()))) for n in range(2)]
            broken = SequenceStream(restore(listing, paths, "skip"), *arguments[1:], states, "skip")
