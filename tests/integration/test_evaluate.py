"""``examples/evaluate.py``: the table and the files that it writes, going on after ``kill -9``, and its refusals."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from argonne.data import train_tokenizer
from tests.integration.runs import command, finish, run, start, succeed
from tests.training.test_init_from import write_origin

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate")
    train_tokenizer(["What is one and one? A. two B. three"] * 9).save_pretrained(path / "tokenizer")
    write_origin(path / "model", path / "tokenizer")
    rows = [
        {"question": f"What is {n} and {n}?", "choices": [str(n * m) for m in (2, 3, 5)], "answer": str(2 * n)}
        for n in range(1, 41)
    ]
    (path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (path / "other").mkdir()
    (path / "other" / "answers.jsonl").write_text('{"score": "text"}\n', encoding="utf-8")
    (path / "few.jsonl").write_text(json.dumps(rows[5]) + "\n", encoding="utf-8")
    return path


def flags(home: Path, **others: Any) -> dict[str, Any]:
    named = {f"--{name.replace('_', '-')}": value for name, value in others.items()}
    own = {"--checkpoint-path": home / "model", "--data": home / "sums.jsonl", "--device": "cpu", "--precision": "fp64"}
    return own | named


def test_one_that_was_killed_goes_on_to_the_same_answers_and_two_processes_find_them_too(home: Path) -> None:
    asked = {"score": "text", "shots": 1, "shots_from": home / "few.jsonl", "batch_size": 1}
    process = start(command("evaluate", flags(home, **asked, output_dir=home / "killed"), 1))
    answers = home / "killed" / "answers.jsonl"
    while not answers.exists() or answers.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert not (home / "killed" / "results.json").exists()
    found = {}
    for name, nproc in (("killed", 1), ("whole", 1), ("two", 2)):
        table = succeed("evaluate", flags(home, **asked, output_dir=home / name), nproc)
        found[name] = [json.loads(row) for row in (home / name / "answers.jsonl").read_text().splitlines()[1:]]
        assert (home / name / "results.md").read_text() in table
    assert found["killed"] == found["whole"]
    for one, two in zip(found["whole"], found["two"], strict=True):
        assert two["log_likelihoods"] == pytest.approx(one["log_likelihoods"], rel=1e-9)
    told = json.loads((home / "whole" / "results.json").read_text())
    assert (told["questions"], told["score"], told["shots"]) == (40, "text", 1)
    assert list(told["accuracy"]["subjects"]) == ["sums"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_path": "no/such"}, "'no/such' does not exist"),
        ({"data": "no/such.csv"}, "'no/such.csv' does not exist"),
        ({"shots": 2, "shots_from": "few.jsonl"}, "shots=2 is more than there are to show of sums"),
        (
            {"shots_from": "few.jsonl"},
            "has no effect without --shots above 0; legal: --shots above 0 too, or leave it out",
        ),
        ({"split": "val"}, "split='val' has no effect without a directory among --data"),
        ({"batch_size": 0}, "batch_size=0 is not legal; legal: 1 or more"),
        ({"subjects": "law"}, "subjects='law' is not among those of the data; legal: sums"),
        ({"context_parallel": 2, "tensor_parallel": 1}, "context_parallel=2 shares out long sequences"),
        ({"window": 65}, "window=65 is not legal; legal: 1 to 64"),
        ({"window": 1, "score": "text"}, "tokens; legal: 1, which the model can see at once"),
        ({"output_dir": "few.jsonl"}, "cannot be made: "),
        ({"output_dir": "other"}, "has answers of another evaluation: score is 'text' there and 'letter' here"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused_in_one_line(home: Path, change: dict[str, Any], message: str) -> None:
    known = {"few.jsonl": home / "few.jsonl", "other": home / "other"}
    done = run("evaluate", flags(home, **{name: known.get(value, value) for name, value in change.items()}), nproc=2)
    assert (done.status, done.output.count("\n")) == (2, 1), done.output
    assert message in done.output
