from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from argonne.data import train_tokenizer
from argonne.parallel import ProcessGroups
from argonne.training.config import DataFlags, ModelFlags, RunConfig, RunFlags
from argonne.training.run.corpora import Corpora
from argonne.training.run.identity import RunIdentity
from argonne.training.run.setup import prepare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard, rows in enumerate((5, 7, 9)):
        texts = [f"shard {shard}, row {row}" for row in range(rows)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{shard}.parquet")
    return tmp_path


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("accepts", [False, True])
def test_a_shard_that_one_rank_cannot_open_is_the_same_to_all(folder, goes_on, accepts) -> None:
    flags = DataFlags(data_glob=(f"{folder}/*.parquet",), on_bad_shard="skip", accept_data_change=accepts)
    saved = RunIdentity(data=Corpora.open(flags, seed=0).identity) if goes_on else None
    sees_all = Corpora.open(flags, 0, saved)
    (folder / "1.parquet").write_bytes(b"not what it was")
    sees_two = Corpora.open(flags, 0, saved)
    reasons = [dict(sees_two.quarantined[0])]
    assert reasons != [{}] == sees_all.quarantined
    one, other = sees_all.without(reasons), sees_two.without(reasons)
    assert one.identity == other.identity
    assert one.shards == other.shards
    # A run that goes on with the same data keeps the ways of its lanes.
    assert one.shards[1].rows == ((7,) if goes_on and not accepts else ())


def test_the_filters_of_a_run_that_names_none_are_what_older_runs_have(folder: Path) -> None:
    data = Corpora.open(DataFlags(data_glob=(f"{folder}/*.parquet",)), 0).identity
    kept = {"long_characters": 50, "max_digits": 0.5, "min_readable": 0.3, "min_tokens": 10}
    assert json.dumps(data["filters"]) == json.dumps(kept)
    assert data["text_column"] == "text"


def test_held_out_text_is_read_and_filtered_as_the_text_of_training_is(tmp_path: Path) -> None:
    """The same rows, from the same column: a loss on rows that training never sees would say something else."""
    long, short = "some words that make a document of more than ten tokens", "too short"
    for name in ("train", "held-out"):
        rows = [long, "1" * 80, short, long, "#" * 80]
        pq.write_table(pa.table({"text": ["other text " * 9] * 5, "body": rows}), tmp_path / f"{name}.parquet")
    tokenizer = train_tokenizer([f"{long} {short} 1 #"] * 20)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in (long, "1" * 80, short, "#" * 80)}

    def held_out(**flags: Any) -> list[int]:
        data = DataFlags(
            data_glob=(f"{tmp_path}/train.parquet",),
            validation_glob=(f"{tmp_path}/held-out.parquet",),
            tokenizer_path=tmp_path / "tokenizer",
            block_size=1,
            validation_sequences=10**4,
            text_column="body",
            **flags,
        )
        model = ModelFlags("demo", vocab_size=400)
        workload = prepare(RunConfig(model, data, run=RunFlags(tmp_path / "run")), ProcessGroups.single())
        assert workload.held_out is not None
        return workload.held_out[0].flatten().tolist()

    def expected(*texts: str) -> list[int]:
        whole = [token for text in texts for token in ids[text]]
        return whole[: len(whole) // 2 * 2]

    assert held_out() == expected(long, long)
    assert held_out(filter_max_digits=1.0, filter_min_readable=0.0) == expected(long, "1" * 80, long, "#" * 80)
    assert held_out(filter_long_characters=80) == held_out(filter_max_digits=1.0, filter_min_readable=0.0)
    assert held_out(filters="none") == expected(long, "1" * 80, short, long, "#" * 80)
    assert held_out(filter_min_tokens=1) == expected(long, short, long)
