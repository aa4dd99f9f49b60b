"""A run that goes on where a run of the original was, in processes of its own: killed at once, and at other layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from argonne.data import train_tokenizer
from tests.integration.runs import metrics, run, run_until_killed, succeed
from tests.training.test_elsewhere import converted, old_file, write_equal

pytestmark = pytest.mark.slow

SHAPE = {
    "--preset": "demo",
    "--hidden-size": 16,
    "--num-hidden-layers": 1,
    "--num-attention-heads": 2,
    "--num-key-value-heads": 2,
    "--intermediate-size": 24,
    "--vocab-size": 400,
}


def test_its_batches_are_those_of_the_undisturbed_run_whatever_the_layout_and_when_it_is_killed(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some words and more of them"] * 9)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    asked: dict[str, Any] = {
        "--data-glob": write_equal(tmp_path / "corpus", tokenizer, sequences=2),
        "--tokenizer-path": tmp_path / "tokenizer",
        "--data-lanes": 3,
        "--block-size": 16,
        "--initial-batch-size": 2,
        "--gradient-accumulation-steps": 2,
        "--total-steps": 6,
        "--warmup-steps": 1,
        "--learning-rate": 0.01,
        "--save-interval": 3,
        "--sample-tokens": 2,
    }
    succeed("pretrain", {**asked, **SHAPE, "--output-dir": tmp_path / "whole"}, nproc=1)
    place = {"current_file_idx": 1, "position_in_file": 2}  # three lanes have been through one unit of two rows each
    file = old_file(tmp_path / "whole" / "step_00000003", tmp_path / "old.pth", place)
    origin = converted(file, tmp_path / "origin", tmp_path / "tokenizer")

    going_on = {**asked, "--init-from": origin, "--resume-state": None, "--output-dir": tmp_path / "run"}
    run_until_killed("pretrain", {**going_on, "--save-interval": 9}, 1, nproc=2)
    assert not list((tmp_path / "run").glob("step_*"))
    succeed("pretrain", {**going_on, "--stop-at-step": 5}, nproc=2)
    origin.rename(tmp_path / "gone")
    succeed("pretrain", {**going_on, "--data-parallel": 2}, nproc=2)

    ours, whole = metrics(tmp_path / "run"), metrics(tmp_path / "whole")[3:]
    assert [line["layout"]["tensor"] for line in ours] == [2, 2, 1]
    for one, other in zip(ours, whole, strict=True):
        assert all(one[key] == other[key] for key in ("step", "batch_hash", "learning_rate", "tokens", "data_position"))
    assert ours[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)  # the same weights

    done = run(
        "pretrain", {**going_on, "--total-steps": 3, "--init-from": tmp_path / "gone", "--output-dir": tmp_path / "x"}
    )
    assert (done.status, done.output.count("\n")) == (2, 1), done.output
    assert "total_steps=3 is not past step 3, of resume_state.json; legal: more than 3" in done.output
