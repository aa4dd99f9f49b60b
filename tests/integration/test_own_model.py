"""A model that is not ours through the whole workflow: Parquet text, checkpoints, killed, moved, refused."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.integration.runs import (
    ROOT,
    SCHEDULE,
    Finished,
    finish,
    history,
    kill_job,
    metrics,
    start,
    wait_for_steps,
    weights,
    words_of,
    write_corpus,
)

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples" / "custom_model.py"


def neox(command: str, flags: dict[str, Any], nproc: int, script: Path = EXAMPLE) -> Finished:
    return finish(start([sys.executable, str(script), command, *words_of({"--nproc": nproc, **flags})]))


def succeed(command: str, flags: dict[str, Any], nproc: int) -> str:
    done = neox(command, flags, nproc)
    assert done.status == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    own = {"--data-glob": corpus / "*.parquet", "--precision": "fp64", "--device": "cpu", "--data-lanes": 3}
    return {**SCHEDULE, **own}


@pytest.fixture(scope="module")
def undisturbed(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All steps at TP 2."""
    directory = tmp_path_factory.mktemp("undisturbed")
    output = succeed("pretrain", {**flags, "--tensor-parallel": 2, "--output-dir": directory}, 2)
    assert "| tensor=2 on cpu |" in output
    return directory


@pytest.fixture(scope="module")
def killed(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at TP 2 that was killed after step 6, and has a checkpoint of step 4."""
    directory = tmp_path_factory.mktemp("killed")
    words = words_of({**flags, "--nproc": 2, "--tensor-parallel": 2, "--output-dir": directory})
    job = start([sys.executable, str(EXAMPLE), "pretrain", *words])
    wait_for_steps(job, directory, 6)
    kill_job(job)
    assert finish(job).status == -signal.SIGKILL
    return directory


def test_killed_and_resumed_at_the_same_layout_then_at_another_it_is_the_undisturbed_run(
    flags: dict[str, Any], undisturbed: Path, killed: Path
) -> None:
    """To the bit as long as the layout is the same, and within the rounding of float64 beyond."""
    expected = history(undisturbed)
    output = succeed("resume", {"--checkpoint-path": killed, "--stop-at-step": 8, "--tensor-parallel": 2}, 2)
    assert "continuing from " in output
    assert history(killed) == expected[:8]
    here = json.loads((killed / "step_00000008" / "manifest.json").read_text())["tensors"]
    there = json.loads((undisturbed / "step_00000008" / "manifest.json").read_text())["tensors"]
    assert here == there

    output = succeed("pretrain", {**flags, "--output-dir": killed}, 1)
    assert f"continuing from {killed / 'step_00000008'}" in output
    found = metrics(killed)
    assert [line["step"] for line in found] == list(range(1, 13))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in expected], rel=1e-9)
    assert [line["batch_hash"] for line in found] == [line["batch_hash"] for line in expected]
    assert weights(killed).keys() == weights(undisturbed).keys()


def test_its_checkpoints_are_safetensors_under_the_names_of_its_own_modules(undisturbed: Path) -> None:
    last = sorted(undisturbed.glob("step_*"))[-1]
    names: set[str] = set()
    for path in last.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    assert {"embedding.weight", "blocks.1.attention.key.weight", "blocks.0.norms.1.bias", "head.weight"} <= names
    assert json.loads((last / "config.json").read_text())["architectures"] == ["NeoX"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"--pipeline-parallel": 2}, "pipeline_parallel=2 is not offered by model=NeoX; legal: 1"),
        ({"--hidden-size": 64}, "hidden_size=64 has no effect on a model of one's own; legal: leave it out"),
    ],
    ids=["pipeline", "flag of the Argonne model"],
)
def test_what_it_does_not_offer_is_refused_in_one_line(
    flags: dict[str, Any], tmp_path: Path, own: dict[str, Any], message: str
) -> None:
    done = neox("pretrain", {**flags, **own, "--output-dir": tmp_path / "run"}, 2)
    assert done.status == 2, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("argonne: error: ")]
    assert message in line
    assert not (tmp_path / "run" / "run.json").exists()


PAGE = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")


def test_the_driver_of_the_page_is_short_and_trains_and_resumes_the_model_of_the_page(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    (model,) = re.findall(r"^```python\n(# .*?mine\.py\n.*?)^```$", PAGE, re.M | re.S)
    (driver,) = re.findall(r"^```py\n(.*?)^```$", PAGE, re.M | re.S)
    assert driver.count("\n") <= 40
    (tmp_path / "mine.py").write_text(model)
    script = tmp_path / "train_mine.py"
    script.write_text(driver)
    run = tmp_path / "run"
    for command, words, nproc in (
        ("pretrain", {**flags, "--output-dir": run, "--stop-at-step": 2, "--tensor-parallel": 2}, 2),
        ("resume", {"--checkpoint-path": run, "--stop-at-step": 4}, 1),
    ):
        done = neox(command, words, nproc, script)
        assert done.status == 0, done.output
    losses = [line["loss"] for line in metrics(run)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
