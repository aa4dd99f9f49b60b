"""A run that begins with another model's weights, in processes of their own: killed, continued, at other layouts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from argonne.data import train_tokenizer
from tests.integration.runs import history, metrics, run, run_until_killed, succeed, weights, write_corpus
from tests.training.test_init_from import write_origin

pytestmark = pytest.mark.slow

FLAGS = {
    "--block-size": 32,
    "--initial-batch-size": 3,
    "--gradient-accumulation-steps": 2,
    "--total-steps": 6,
    "--warmup-steps": 2,
    "--learning-rate": 3e-3,
    "--save-interval": 3,
    "--sample-tokens": 2,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a corpus, and a model of 3 key-value heads in ``origin``."""
    path = tmp_path_factory.mktemp("init_from")
    write_corpus(path / "corpus")
    train_tokenizer(["some words and more of them"] * 9).save_pretrained(path / "tokenizer")
    write_origin(path / "origin", path / "tokenizer")
    return path


def flags(home: Path, directory: str, **others: Any) -> dict[str, Any]:
    begun = {"--init-from": home / "origin", "--data-glob": home / "corpus/*.parquet"}
    named = {f"--{name.replace('_', '-')}": value for name, value in others.items()}
    return {**FLAGS, **begun, "--output-dir": home / directory, **named}


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """The six steps at TP 3."""
    assert "beginning with the weights of" in succeed("pretrain", flags(home, "whole"), nproc=3)
    return home / "whole"


def test_a_run_that_is_killed_before_and_after_its_first_save_is_the_undisturbed_one(home: Path, whole: Path) -> None:
    asked = flags(home, "killed")
    run_until_killed("pretrain", asked, 1, nproc=3)
    run_until_killed("pretrain", asked, 4, nproc=3)
    kept = shutil.move(home / "origin", home / "away")
    try:
        succeed("pretrain", asked, nproc=3)
    finally:
        shutil.move(kept, home / "origin")
    assert history(home / "killed") == history(whole)
    assert weights(home / "killed") == weights(whole)


def test_one_process_trains_as_three_do(home: Path, whole: Path) -> None:
    succeed("pretrain", flags(home, "alone"), nproc=1)
    for one, three in zip(metrics(home / "alone"), metrics(whole), strict=True):
        assert one["batch_hash"] == three["batch_hash"]
        assert one["loss"] == pytest.approx(three["loss"], rel=1e-5)


def test_a_reproducible_run_has_the_same_bits_at_every_layout(home: Path) -> None:
    for name, nproc in (("one", 1), ("three", 3)):
        succeed("pretrain", flags(home, name, total_steps=2, reproducible=None, reproducible_blocks=3), nproc=nproc)
    assert weights(home / "one") == weights(home / "three")


def test_what_contradicts_the_directory_is_refused_before_any_process_is_started(home: Path) -> None:
    done = run("pretrain", flags(home, "never", tensor_parallel=4), nproc=4)
    assert (done.status, done.output.count("\n")) == (2, 1), done.output
    assert "num_attention_heads=6 is not divisible by tensor_parallel=4" in done.output
    done = run("pretrain", flags(home, "never", hidden_size=32), nproc=3)
    assert (done.status, done.output.count("\n")) == (2, 1), done.output
    assert "hidden_size=32 contradicts init_from=" in done.output
    assert not (home / "never").exists()
