"""What a save tells people: it is on the disk before the checkpoint that it goes with, and says what the run is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from argonne.models import ArgonneConfig
from argonne.parallel import Layout
from argonne.training.config import DataFlags, RunConfig, TrainingFlags
from argonne.training.report import Reports
from tests.checkpoint.watch import watched

SHAPE = ArgonneConfig(16, 2, 4, 2, 53, 24, 16)
LAYOUT = Layout(data=2, tensor=3)
CONFIG = RunConfig(data=DataFlags(block_size=7), training=TrainingFlags(initial_batch_size=4))


def save(reports: Reports, step: int) -> None:
    """That of a run of 24 samples a step."""
    reports.step({"step": step, "tokens": 168 * step, "loss": 2.5, "validation_loss": None})
    data = SimpleNamespace(shards_seen=lambda lanes: ["part-0"])
    workload = SimpleNamespace(model=SHAPE, data=data, precision=SimpleNamespace(compute=torch.bfloat16))
    model = SimpleNamespace(groups=SimpleNamespace(layout=LAYOUT))
    state = SimpleNamespace(step=step, tokens=168 * step, model=model)
    reports.save(CONFIG, cast(Any, workload), cast(Any, state), {}, 24, "a text")


def test_what_a_checkpoint_follows_is_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut may leave the checkpoint, and of the steps before it nothing."""
    reports = Reports(tmp_path)
    for step in (5, 10):
        with watched(tmp_path, monkeypatch) as operations:
            save(reports, step)
        for name in ("metrics.jsonl", "samples.md"):
            kinds = [operation.kind for operation in operations if operation.path == tmp_path / name]
            assert kinds[-2:] == ["write", "sync"], name


def test_the_statistics_of_a_save_are_those_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(Reports(tmp_path), 10)
    assert capsys.readouterr().err == ""
    told = json.loads((tmp_path / "stats" / "step_00000010.json").read_text())
    assert (told["global_steps"], told["total_tokens"], told["batch_size"]) == (10, 1680, 4)
    assert (told["gradient_accumulation_steps"], told["effective_tokens_per_step"]) == (3, 168)
    assert (told["model_params"], told["amp_dtype"]) == (SHAPE.parameter_count, "bfloat16")
