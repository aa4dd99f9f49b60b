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
from argonne.training import trainer
from argonne.training.config import DataFlags, RunConfig, TrainingFlags
from argonne.training.report import Reports
from argonne.training.schedule import CosineSchedule
from argonne.training.trainer import Trainer
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


def test_a_step_is_measured_over_all_the_processes_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = 3e9
    monkeypatch.setattr(trainer, "peak_flops", lambda device: peak)
    groups = SimpleNamespace(device=torch.device("cpu"), world=SimpleNamespace(size=6), layout=LAYOUT)
    state = SimpleNamespace(step=10, tokens=1680, schedule=CosineSchedule(1e-3, 1e-5, 10, 100))
    itself = SimpleNamespace(
        config=CONFIG, workload=SimpleNamespace(model=SHAPE), state=state, groups=groups, tokens_per_step=168
    )
    batch = SimpleNamespace(states={}, digest="abc", next_sample=240)
    line = Trainer._record(cast(Any, itself), cast(Any, batch), 2.5, 1.25, seconds=0.5, waited=0.1)
    assert (line["step"], line["tokens"], line["loss"], line["grad_norm"]) == (10, 1680, 2.5, 1.25)
    assert (line["step_time"], line["data_wait"], line["batch_hash"]) == (0.5, 0.1, "abc")
    assert line["learning_rate"] == pytest.approx(1e-3)
    assert line["tokens_per_second"] == pytest.approx(336)
    assert line["mfu"] == pytest.approx(336 * SHAPE.flops_per_token(7) / (6 * peak))


def test_the_sample_of_a_step_is_drawn_with_the_runs_seed_and_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same after an interruption, and another at every save."""
    seeds = []
    monkeypatch.setattr(trainer, "sample_text", lambda model, tokenizer, tokens, seed: seeds.append(seed))
    config = RunConfig(training=TrainingFlags(seed=30))
    state = SimpleNamespace(step=10, model=None, all_lanes=dict, save=lambda *parts: Path("step_00000010"))
    itself = SimpleNamespace(
        config=config, workload=SimpleNamespace(tokenizer=None), state=state, global_batch=24, save_seconds=0.0
    )
    for state.step in (10, 20):
        Trainer._save(cast(Any, itself), None)
    assert seeds == [40, 50]
