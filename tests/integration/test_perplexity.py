"""``examples/perplexity.py``: one line of JSON, a table, and refusals of one line before any process is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from argonne.data import train_tokenizer
from tests.integration.runs import run, succeed, write_corpus
from tests.training.test_init_from import write_origin

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("perplexity")
    write_corpus(path / "corpus", documents=4, shards=1)
    train_tokenizer(["some words and more of them"] * 9).save_pretrained(path / "tokenizer")
    write_origin(path / "model", path / "tokenizer")
    (path / "notes.txt").write_text("A few words, ☃ and some more.\n", encoding="utf-8")
    (path / "noise.txt").write_bytes(b"\xff\xfe")
    return path


def flags(home: Path, **others: Any) -> dict[str, Any]:
    text = [home / "notes.txt", home / "corpus/*.parquet"]
    named = {f"--{name.replace('_', '-')}": value for name, value in others.items()}
    return {"--checkpoint-path": home / "model", "--text": text, "--device": "cpu", **named}


def test_two_processes_tell_what_one_does_as_json_and_as_a_table(home: Path) -> None:
    asked = flags(home, precision="fp64", window=50, stride=20, output="json")
    one, two = (json.loads(succeed("perplexity", asked, nproc=nproc)) for nproc in (1, 2))
    assert one["documents"] == 5
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == (pytest.approx(value, rel=1e-10) if isinstance(value, float) else value), name
    table = succeed("perplexity", flags(home, precision="fp64", window=50, stride=20), nproc=1)
    assert f"loss           {one['loss']:.6f}" in table
    assert f"tokens         {one['tokens']:,}" in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_path": "no/such"}, "'no/such' does not exist"),
        ({"text": "no/such.txt"}, "no data shards match no/such.txt"),
        ({"text": "noise"}, "is no text in UTF-8"),
        ({"text_column": "other"}, "other"),
        ({"window": 65}, "window=65 is not legal; legal: 1 to 64"),
        ({"stride": 0}, "stride=0 is not legal"),
        ({"precision": "int8"}, "precision='int8' is not known"),
        ({"tensor_parallel": 4}, "tensor_parallel=4"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_refused_in_one_line(home: Path, change: dict[str, Any], message: str) -> None:
    if change.get("text") == "noise":
        change = {"text": home / "noise.txt"}
    if "text_column" in change:
        change = {**change, "text": home / "corpus/*.parquet"}
    done = run("perplexity", flags(home, **change), nproc=4 if "tensor_parallel" in change else 2)
    assert (done.status, done.output.count("\n")) == (2, 1), done.output
    assert message in done.output
