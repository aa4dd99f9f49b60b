"""Whole runs on data that is made beforehand, damaged, or changed on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.integration.runs import metrics, run, succeed, write_corpus
from tests.integration.test_refusals import assert_refused

pytestmark = pytest.mark.slow


def hashes(directory: Path) -> list[str]:
    return [line["batch_hash"] for line in metrics(directory)]


@pytest.fixture
def own_corpus(tmp_path: Path) -> Path:
    """Shards with page checksums, to be damaged."""
    folder = write_corpus(tmp_path / "corpus")
    for path in folder.glob("*.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=7, write_page_checksum=True)
    return folder


def damage(path: Path, row_group: int) -> None:
    """Flip one bit in the text of a row group."""
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(row_group).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start + column.total_compressed_size // 2] ^= 8
    path.write_bytes(content)


def test_a_run_on_tokens_made_beforehand_is_the_same_in_every_layout_and_makes_them_once(
    flags: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    made = {**flags, "--no-streaming": None, "--num-proc": 2, "--precision": "fp64", "--data-lanes": 8}
    made |= {"--cache-dir": tmp_path / "cache", "--document-mask": None}
    made |= {"--data-glob": [f"{corpus}/part-0.parquet:2", f"{corpus}/part-[12].parquet:1"]}
    first = succeed("pretrain", {**made, "--output-dir": tmp_path / "alone"}, nproc=1)
    assert "rows tokenised" in first
    moved = tmp_path / "moved"
    for stop, layout in ((5, {"--tensor-parallel": 2}), (9, {"--data-parallel": 2}), (12, {"--pipeline-parallel": 2})):
        again = succeed("pretrain", {**made, **layout, "--stop-at-step": stop, "--output-dir": moved})
        assert "tokenised" not in again
    assert hashes(moved) == hashes(tmp_path / "alone")
    losses = [line["loss"] for line in metrics(moved)]
    assert losses == pytest.approx([line["loss"] for line in metrics(tmp_path / "alone")], rel=1e-9)
    seeded = {**made, "--seed": 1, "--stop-at-step": 1, "--output-dir": tmp_path / "seeded"}
    assert "tokenised" not in succeed("pretrain", seeded, nproc=1)
    assert hashes(tmp_path / "seeded") != hashes(tmp_path / "alone")[:1], "the order does not depend on the seed"
    other = {name: value for name, value in made.items() if name != "--no-streaming"}
    done = run("pretrain", {**other, "--output-dir": moved})
    assert_refused(done, "data.streaming: false -> true")


def test_a_damaged_row_group_stops_a_run_in_one_line_or_is_passed_over_alike_in_every_layout(
    flags: dict[str, Any], own_corpus: Path, tmp_path: Path
) -> None:
    damage(own_corpus / "part-0.parquet", 2)
    bad = {**flags, "--data-glob": own_corpus / "*.parquet", "--data-lanes": 4}
    done = run("pretrain", {**bad, "--output-dir": tmp_path / "stopped"})
    assert_refused(done, "row group 2 of shard")
    assert "part-0.parquet cannot be read" in done.output

    skip = {**bad, "--on-bad-shard": "skip"}
    one = succeed("pretrain", {**skip, "--output-dir": tmp_path / "one"}, nproc=1)
    assert one.count("row group 2 of shard") == 1
    assert "rows dropped: 7 unreadable" in one
    two = tmp_path / "two"
    same_batch = {**skip, "--gradient-accumulation-steps": 1, "--output-dir": two}
    succeed("pretrain", {**same_batch, "--data-parallel": 2, "--stop-at-step": 6})
    succeed("pretrain", {**same_batch, "--tensor-parallel": 2})
    assert hashes(two) == hashes(tmp_path / "one")
    lanes = json.loads((two / "step_00000012" / "trainer.json").read_text())["data"]["lanes"]
    assert {tuple(place) for lane in lanes.values() for place in lane["unreadable"]} == {(0, 2)}
    assert json.loads((two / "stats" / "step_00000012.json").read_text())["documents_dropped"]["unreadable"] > 0


@pytest.mark.slow
def test_a_shard_that_cannot_be_opened_stays_away_also_when_it_can_be_again(
    flags: dict[str, Any], own_corpus: Path, tmp_path: Path
) -> None:
    whole = (own_corpus / "part-2.parquet").read_bytes()
    (own_corpus / "part-2.parquet").write_bytes(whole[: len(whole) // 2])
    skip = {**flags, "--data-glob": own_corpus / "*.parquet", "--on-bad-shard": "skip"}
    done = run("pretrain", {**skip, "--on-bad-shard": "raise", "--output-dir": tmp_path / "raise"})
    assert_refused(done, "part-2.parquet")
    first = succeed("pretrain", {**skip, "--output-dir": tmp_path / "run", "--stop-at-step": 6})
    assert first.count("part-2.parquet") == 1, first
    (own_corpus / "part-2.parquet").write_bytes(whole)
    succeed("pretrain", {**skip, "--output-dir": tmp_path / "run"})
    (own_corpus / "part-2.parquet").unlink()
    succeed("pretrain", {**skip, "--output-dir": tmp_path / "without"})
    assert hashes(tmp_path / "run") == hashes(tmp_path / "without")


@pytest.mark.slow
def test_a_shard_that_is_lost_on_the_way_keeps_its_place_among_the_others(
    flags: dict[str, Any], own_corpus: Path, tmp_path: Path
) -> None:
    skip = {**flags, "--data-glob": own_corpus / "*.parquet", "--on-bad-shard": "skip"}
    succeed("pretrain", {**skip, "--output-dir": tmp_path / "run", "--stop-at-step": 4})
    (own_corpus / "part-0.parquet").unlink()
    done = run("pretrain", {**skip, "--on-bad-shard": "raise", "--output-dir": tmp_path / "run"})
    assert_refused(done, "data.shards: shard part-0.parquet was removed")
    assert "--accept-data-change" in done.output
    again = succeed("pretrain", {**skip, "--output-dir": tmp_path / "run"})
    assert "part-0.parquet" in again
    assert len(metrics(tmp_path / "run")) == 12


def test_changed_data_is_refused_naming_what_changed_and_accepted_on_purpose(
    flags: dict[str, Any], own_corpus: Path, tmp_path: Path
) -> None:
    mine = {**flags, "--data-glob": own_corpus / "*.parquet", "--output-dir": tmp_path / "run", "--data-lanes": 4}
    succeed("pretrain", {**mine, "--stop-at-step": 4})
    shutil.copy(own_corpus / "part-0.parquet", own_corpus / "part-3.parquet")
    for command, words in (("pretrain", mine), ("resume", {"--checkpoint-path": tmp_path / "run"})):
        done = run(command, words)
        assert_refused(done, "part-3.parquet")
        assert "legal: the run's own flags, or another --output-dir, or --accept-data-change" in done.output
    went_on = succeed("pretrain", {**mine, "--accept-data-change": None, "--stop-at-step": 8})
    assert "accepted from here on: data.shards: " in went_on
    assert "4 of 4 lanes keep their places" in went_on
    done = succeed("pretrain", mine)  # what was accepted is the run's data from there on
    assert "accepted" not in done
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 13))
    done = run("pretrain", {**mine, "--learning-rate": 1, "--accept-data-change": None})
    assert_refused(done, "schedule.learning_rate")
