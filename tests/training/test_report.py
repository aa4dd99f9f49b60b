"""What a save leaves for people in files, what of it is dropped on continuing; and none of it is worth a run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from argonne.data import DataPosition, LaneState
from argonne.models import ArgonneConfig
from argonne.parallel import Layout
from argonne.training import report
from argonne.training.batch_shape import BatchShape
from argonne.training.config import DataFlags, RunConfig, TrainingFlags
from argonne.training.report import Reports, data_line
from tests.checkpoint.watch import watched

SHAPE = ArgonneConfig(16, 2, 4, 2, 53, 24, 16)
LAYOUT = Layout(data=2, pipeline=2)
TRAINING = TrainingFlags(
    initial_batch_size=3, learning_rate=2e-3, min_learning_rate=1e-5, warmup_steps=7, total_steps=90
)
CONFIG = RunConfig(data=DataFlags(block_size=5), training=TRAINING)
BATCH = BatchShape(3, 4, 2, 5)
LANES = {
    0: LaneState(DataPosition(0, 1, 0, 3), documents=11, tokens=400, dropped={"too short": 2, "no letters": 1}),
    1: LaneState(DataPosition(0, 4, 2, 0), documents=6, tokens=390, dropped={"too short": 5}),
}


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was to be plotted; matplotlib takes its time."""
    plots: list[Any] = []
    monkeypatch.setattr(report, "plot_loss", lambda *what: plots.append(what))
    return plots


def step(reports: Reports, number: int, loss: float = 2.5) -> None:
    reports.step({"step": number, "tokens": 120 * number, "loss": loss, "validation_loss": None})


def save(reports: Reports, number: int, text: str = "a text") -> None:
    data = SimpleNamespace(shards_seen=lambda lanes: 2 + max(lane.position.shard for lane in lanes.values()))
    of_run = SimpleNamespace(shape=asdict(SHAPE))
    workload = SimpleNamespace(model=of_run, data=data, precision=SimpleNamespace(compute=torch.float16))
    model = SimpleNamespace(groups=SimpleNamespace(layout=LAYOUT), parameter_count=SHAPE.parameter_count)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}, {"lr": 0.1, "fused": True}])
    state = SimpleNamespace(step=number, tokens=120 * number, model=model, optimizer=optimizer)
    reports.save(CONFIG, cast(Any, workload), cast(Any, state), LANES, BATCH, text)


def test_what_a_checkpoint_follows_is_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut may leave the checkpoint, and of the steps before it nothing."""
    reports = Reports(tmp_path)
    for number in (5, 10):
        with watched(tmp_path, monkeypatch) as operations:
            step(reports, number)
            save(reports, number)
        for name in ("metrics.jsonl", "samples.md"):
            kinds = [operation.kind for operation in operations if operation.path == tmp_path / name]
            assert kinds[-2:] == ["write", "sync"], name


def test_samples_say_the_step_the_tokens_and_the_loss_and_quote_every_line_of_the_text(tmp_path: Path) -> None:
    reports = Reports(tmp_path)
    step(reports, 9_999, loss=3.14159)
    step(reports, 10_000, loss=2.71828)
    save(reports, 10_000, "one\n\n# two\n")
    save(reports, 10_001, "")
    assert (tmp_path / "samples.md").read_text() == (
        "## Step 10000 (1,200,000 tokens, loss 2.718)\n\n> one\n> \n> # two\n\n"
        "## Step 10001 (1,200,120 tokens, loss 2.718)\n\n> \n\n"
    )


def test_what_the_model_writes_is_never_taken_for_a_heading_of_the_samples(tmp_path: Path) -> None:
    reports = Reports(tmp_path)
    for number in (4, 8):
        step(reports, number)
        save(reports, number, f"## Step {90 + number}\n## Step 1\n")
    kept = (tmp_path / "samples.md").read_text().partition("## Step 8 ")[0]
    reports.drop_after(4)
    assert (tmp_path / "samples.md").read_text() == kept
    assert "> ## Step 94\n> ## Step 1\n" in kept


def test_the_statistics_of_a_save_are_those_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = Reports(tmp_path)
    step(reports, 30)
    save(reports, 30)
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "stats" / "step_00000030.json").read_text()) == {
        "total_tokens": 3600,
        "batch_size": 3,
        "global_steps": 30,
        "num_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 16,
        "model_params": SHAPE.parameter_count,
        "data_shards_seen": 6,
        "documents_seen": 17,
        "documents_dropped": {"too short": 7, "no letters": 1},
        "base_learning_rate": 2e-3,
        "min_learning_rate": 1e-5,
        "warmup_steps": 7,
        "max_steps": 90,
        "gradient_accumulation_steps": 4,
        "effective_tokens_per_step": 120,
        "amp_dtype": "float16",
        "optimizer": "adamw",
        "fused_adamw": True,
        "parallelism": str(LAYOUT),
    }


def test_the_line_of_a_save_has_the_reasons_by_their_number(tmp_path: Path) -> None:
    assert data_line(LANES) == "data: 17 documents read; rows dropped: 7 too short, 1 no letters"
    unharmed = {0: replace(LANES[0], dropped={}, documents=1_234_567)}
    assert data_line(unharmed) == "data: 1,234,567 documents read; rows dropped: none"
    assert data_line({}) == "data: 0 documents read; rows dropped: none"


def test_the_plot_is_drawn_of_every_step_so_far_and_named_after_the_run(tmp_path: Path, drawn: list[Any]) -> None:
    reports = Reports(tmp_path)
    reports.step({"step": 1, "tokens": 120, "loss": 4.0, "validation_loss": None})
    named = {"web": {"loss": 3.25, "bits_per_byte": 1.5}}
    reports.step({"step": 2, "tokens": 240, "loss": 3.0, "validation_loss": 3.5, "eval": named})
    save(reports, 2)
    title = f"0.0M parameters, {LAYOUT}, 0.00M tokens"
    curves = {"web": ([(240, 3.25)], [(240, 1.5)])}
    assert drawn == [([(120, 4.0), (240, 3.0)], [(240, 3.5)], tmp_path / "loss.png", title, curves)]


def test_a_run_goes_on_from_its_reports_and_adds_to_them(tmp_path: Path, drawn: list[Any]) -> None:
    before = Reports(tmp_path)
    for number in range(1, 8):
        step(before, number, loss=8.0 - number)
        if number in (3, 6):
            save(before, number)
    drawn.clear()
    again = Reports(tmp_path)
    again.drop_after(3)
    step(again, 4, loss=0.5)
    save(again, 4, "again")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 7.0), (2, 6.0), (3, 5.0), (4, 0.5)]
    headings = [line for line in (tmp_path / "samples.md").read_text().splitlines() if line.startswith("##")]
    assert headings == ["## Step 3 (360 tokens, loss 5.000)", "## Step 4 (480 tokens, loss 0.500)"]
    names = sorted(path.name for path in (tmp_path / "stats").iterdir())
    assert names == ["step_00000003.json", "step_00000004.json"]
    curve = [(120, 7.0), (240, 6.0), (360, 5.0), (480, 0.5)]
    assert [training for training, *_ in drawn] == [curve], "the plot forgets, or keeps what was dropped"


def test_a_report_that_fails_is_said_once_and_again_when_it_is_up_to_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = Reports(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    for number in (1, 2, 3):
        step(reports, number)
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 1
    assert warned[0].startswith(f"argonne: warning: {tmp_path / 'metrics.jsonl'}: ")
    assert "Is a directory" in warned[0]
    assert warned[0].endswith("; training goes on, and will try again")
    (tmp_path / "metrics.jsonl").rmdir()
    step(reports, 4)
    assert capsys.readouterr().err == f"argonne: {tmp_path / 'metrics.jsonl'} is up to date again\n"
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4], "a hole is left"


def test_no_fault_of_one_report_keeps_the_others_or_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*what: object) -> None:
        raise RuntimeError("no such font\nand a second line")

    monkeypatch.setattr(report, "plot_loss", fail)
    (tmp_path / "stats").write_text("a file")
    reports = Reports(tmp_path)
    step(reports, 1)
    save(reports, 1)
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 2
    assert str(tmp_path / "stats") in warned[0]
    assert warned[1] == (
        f"argonne: warning: {tmp_path / 'loss.png'}: RuntimeError: no such font; training goes on, and will try again"
    )
    assert (tmp_path / "samples.md").exists()
    assert (tmp_path / "metrics.jsonl").exists()


def test_an_attempt_gives_what_the_action_gives_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = Reports(tmp_path)
    assert reports.attempt(tmp_path, lambda: 3) == 3
    assert reports.attempt(tmp_path, lambda: 1 / 0) is None
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err
