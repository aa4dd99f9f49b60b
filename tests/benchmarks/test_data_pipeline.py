"""benchmarks/data_pipeline.py on a corpus that takes no time, and what it makes of its measurements."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from argonne.data import train_tokenizer
from argonne.parallel import ArgonneError
from benchmarks import data_pipeline
from benchmarks.data_contestants import CONTESTANTS, DATASETS, FAST, FAST_ALONE, LOOP, SLOW, SLOW_ALONE, Job
from benchmarks.data_pipeline import Flags, available, run, take_shards
from benchmarks.data_report import CONTROLS, Record, spread, summarise

BLOCK, SEQUENCES = 32, 2
ROWS = 200
RUN = tuple(each for each in CONTESTANTS if each.name in (FAST, FAST_ALONE, LOOP))


def texts() -> list[str | None]:
    """Documents of many lengths, and one of each kind that is dropped."""
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta", "den Öltank", "ε"], (ROWS - 4, 60))
    kept = [" ".join(row[: 12 + number % 48]) for number, row in enumerate(words)]
    return [*kept[:100], None, "", "0123456789" * 9, "tiny", *kept[100:]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rows = texts()
    for number in range(2):
        pq.write_table(pa.table({"text": rows[number::2]}), folder / f"part-{number}.parquet", row_group_size=30)
    return folder


@pytest.fixture(scope="module")
def job(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([text for text in texts() if text], 400).save_pretrained(tokenizer)
    return Job(tuple(sorted(corpus.iterdir())), tokenizer, BLOCK, SEQUENCES)


@pytest.fixture(scope="module")
def whole_run(job: Job, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON of a run, and what it printed."""
    said = io.StringIO()
    output = tmp_path_factory.mktemp("results") / "out.json"
    flags = Flags(corpus, None, str(job.tokenizer), BLOCK, SEQUENCES, rounds=2, output=output)
    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        # The processes of three take seconds to start; the others have a turn in this one, below.
        patch.setattr(data_pipeline, "available", lambda: RUN)
        run(flags)
    return json.loads(output.read_text()), said.getvalue()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.slow
def test_the_json_has_every_figure_of_every_contestant(whole_run: tuple[dict[str, Any], str]) -> None:
    found, said = whole_run
    assert found["benchmark"] == "data_pipeline"
    assert {"cpu", "cores", "commit", "tokenizers", "pyarrow"} <= set(found["environment"])
    assert found["corpus"]["documents"] == ROWS
    assert found["corpus"]["bytes"] == sum(len(text.encode()) for text in texts() if text)
    assert list(found["contestants"]) == [each.name for each in RUN]
    for name, own in found["contestants"].items():
        assert name in said
        assert set(own["ratios"]) == set(CONTROLS)
        assert len(own["tokens"]) == len(own["tokens_per_second"]["turns"]) == (6 if "fast path" in name else 2)
        assert 0 < own["tokens_per_second"]["median"] <= own["tokens_per_second"]["best"]
        assert own["cpu_seconds_per_million_tokens"] > 0
        assert own["memory"]["samples"] >= 2
        assert own["memory"]["peak_bytes"] >= own["memory"]["median_bytes"] > 1e6
    assert found["contestants"][LOOP]["ratios"]["loop"] == 1
    assert found["contestants"][FAST]["ratios"]["tokenizer_alone"] is not None
    assert found["contestants"][LOOP]["ratios"]["tokenizer_alone"] is None


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=[contestant.name for contestant in CONTESTANTS])
def test_every_contestant_delivers_the_same_documents(contestant: Any, job: Job, offline: None) -> None:
    if contestant.name == DATASETS:
        pytest.importorskip("datasets")
    (alone,) = (each for each in CONTESTANTS if each.name == SLOW_ALONE)
    tokens = alone.prepare(job).turn()
    tokens -= 1  # of "tiny", which only those that pack can drop
    batch = SEQUENCES * (BLOCK + 1)
    ready = contestant.prepare(job)
    first, second = ready.turn(), ready.turn()
    ready.close()
    if contestant.name in (FAST_ALONE, SLOW_ALONE):
        assert first == second == tokens + 1
    elif contestant.name in (LOOP, DATASETS):  # what does not fill a batch at the end of the pass is left
        assert first == second
        assert tokens - batch < first <= tokens
    else:  # each lane goes on into its next pass, and the batches prepared ahead count in the turn that takes them
        assert abs(first + second - 2 * tokens) < 0.2 * tokens


def test_ratios_are_taken_within_each_round() -> None:
    fast, alone = Record([100, 100], [1.0, 2.0], [1.0, 3.0], [5] * 20), Record([100, 100], [0.5, 2.0], [1.0, 1.0], [])
    found = summarise({FAST: fast, FAST_ALONE: alone, LOOP: replace(alone, seconds=[4.0, 4.0])})
    assert found[FAST]["ratios"] == {"tokenizer_alone": 0.75, "datasets": None, "loop": 3.0}
    assert found[FAST]["tokens_per_second"] == {"median": 75, "best": 100, "turns": [100, 50]}
    assert found[FAST]["cpu_seconds_per_million_tokens"] == 20_000
    assert SLOW not in found
    # Two turns of one stand against each of the other.
    pairs = summarise({FAST: Record([100] * 4, [1.0, 3.0, 1.0, 1.0], [1.0] * 4, []), LOOP: alone})
    assert pairs[FAST]["ratios"]["loop"] == median([50 / 200, 100 / 50])


def test_memory_is_judged_after_its_start() -> None:
    found = spread([1, 50, 97, *[100] * 16, 104])
    assert found is not None
    assert found["range_over_median"] == 0.07
    assert found["farthest_over_median"] == 0.04
    assert found["growth"] == 0
    rising = spread([*[100] * 12, *[110] * 8])
    assert rising is not None
    assert rising["growth"] == pytest.approx(0.1)
    assert (found["peak_bytes"], found["samples"], len(found["settled_bytes"])) == (104, 20, 18)
    assert spread([]) is None


def test_shards_are_taken_until_there_is_enough_text(job: Job) -> None:
    whole, size = take_shards(job.shards, None)
    assert whole == job.shards
    first, part = take_shards(job.shards, 1e-6)
    assert first == job.shards[:1]
    assert part < size == take_shards(job.shards, 1e6)[1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rounds": 0}, "rounds=0 is not legal"),
        ({"block_size": -1}, "block_size=-1 is not legal"),
        ({"megabytes": 0.0}, "megabytes=0.0 is not legal"),
    ],
)
def test_what_cannot_be_measured_is_refused(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ArgonneError, match=words):
        replace(Flags(output=tmp_path / "x.json"), **changed).check()


def test_datasets_is_left_out_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [each.name for each in available()] == [each.name for each in CONTESTANTS if each.name != DATASETS]
    assert f"{DATASETS} is left out" in capsys.readouterr().out


def test_a_tokenizer_that_is_not_there_is_refused(job: Job, tmp_path: Path, corpus: Path) -> None:
    flags = Flags(corpus, None, str(tmp_path / "none"), output=tmp_path / "x.json")
    with pytest.raises(ArgonneError, match="is not a directory"):
        run(flags)
