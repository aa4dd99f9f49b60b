"""What a run tells: metrics that round-trip to the bit, FLOPs that are counted, lines a person can read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from argonne.models import ArgonneConfig, ArgonneModel, Execution, preset
from argonne.parallel import ProcessGroups
from argonne.training.metrics import MetricsLog, Progress, memory_gib, peak_flops


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_the_weights_are_those_of_the_matrix_products_that_run(tied: bool) -> None:
    config = ArgonneConfig(24, 2, 6, 3, 56, 40, max_position_embeddings=16, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = ArgonneModel(config, Execution(ProcessGroups.single("meta")))
        ids = torch.zeros(3, 10, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model.logits(ids).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    # At a sequence of 0 only the weights are left. A norm's weights multiply no matrix, and count all the same.
    assert model.flops_per_token(0) == products / 30 + 6 * norms


def test_flops_of_attention_are_half_a_square_of_scores_and_values() -> None:
    with torch.device("meta"):
        model = ArgonneModel(preset("argonne-2.0-4.9b"), Execution(ProcessGroups.single("meta")))
    scores_and_values = 2 * 2 * 24 * 170 * 4096 / 2
    assert model.flops_per_token(4096) - model.flops_per_token(0) == 24 * 3 * scores_and_values


def test_the_cpu_has_memory_but_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
    assert 0.01 < memory_gib(torch.device("cpu")) < 1000


def test_the_memory_of_a_process_is_not_that_of_its_launcher() -> None:
    held = torch.ones(2**28)  # 1 GiB, until the child has started
    code = "from argonne.training.metrics import memory_gib; import torch; print(memory_gib(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.9, f"{held.nbytes} bytes are the launcher's"


def test_the_peak_of_a_gpu_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("Other", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_float32_loss_is_written_exactly(loss: float) -> None:
    value = torch.tensor(loss)
    assert torch.equal(torch.tensor(json.loads(json.dumps({"loss": value.item()}))["loss"]), value)


def lines_of(log: MetricsLog) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.file.path.read_text(encoding="utf-8").splitlines()]


def test_the_log_has_what_was_written_in_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    records = [{"step": step, "loss": 1 / step, "mfu": None, "data_position": {"shard": "a"}} for step in (1, 2, 3)]
    for record in records:
        log.write(record)
    assert lines_of(log) == records


def test_a_number_that_json_has_not_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "tokens": 8, "loss": 2.5, "validation_loss": math.nan, "mfu": math.inf})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "tokens": 8, "loss": 2.5, "validation_loss": null, "mfu": null}\n'
    )
    assert log.held_out.points == []


@given(st.integers(0, 12), st.integers(-1, 14))
def test_lines_past_a_step_are_dropped_and_the_others_kept_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, written: int, step: int
) -> None:
    log = MetricsLog(tmp_path_factory.mktemp("run") / "metrics.jsonl")
    path = log.file.path
    assert not log.drop_after(step)
    assert not path.exists()
    for number in range(1, written + 1):
        log.write({"step": number, "loss": 0.1 * number})
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if written else []
    assert log.drop_after(step) == (written > max(step, 0))
    if written:
        assert path.read_text(encoding="utf-8") == "".join(lines[: max(step, 0)])
    assert [path.name for path in path.parent.iterdir()] in ([], ["metrics.jsonl"])


@pytest.mark.parametrize(
    "tail", ['{"step": 3, "lo', "{", "\x00\x00\x00", '{"loss": 2.0}', "[1]\n", '{"step": "3"}\n', "é"]
)
def test_a_line_that_an_interruption_cut_short_is_dropped(tmp_path: Path, tail: str) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    log.write({"step": 2})
    with log.file.path.open("ab") as file:
        file.write(tail.encode("latin-1"))
    log.drop_after(5)
    log.write({"step": 3})
    assert [record["step"] for record in lines_of(log)] == [1, 2, 3]


def test_the_plot_goes_on_from_the_lines_that_stay(tmp_path: Path) -> None:
    undisturbed, stopped = MetricsLog(tmp_path / "one"), MetricsLog(tmp_path / "two")
    for step in range(1, 3001):
        line = record(step, loss=math.sin(step) + 50 / step, validation_loss=2.0 + step if step % 7 == 0 else None)
        undisturbed.write(line)
        if step <= 2500:
            stopped.write(line)
    resumed = MetricsLog(stopped.file.path)
    resumed.drop_after(1234)
    for line in lines_of(undisturbed)[1234:]:
        resumed.write(line)
    assert resumed.training.points == undisturbed.training.points
    assert resumed.held_out.points == undisturbed.held_out.points
    assert len(resumed.held_out.points) == 3000 // 7
    assert stopped.file.path.read_bytes() == undisturbed.file.path.read_bytes()


def record(step: int, **changed: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 3.14159,
        "tokens": 12_345 * step,
        "learning_rate": 1e-4,
        "tokens_per_second": 98_765.4,
        "step_time": 2.0,
        "data_wait": 0.01,
        "memory_gib": 1.25,
        "mfu": None,
        "validation_loss": None,
        "data_position": {"shard": "train-00002.parquet", "row": 17, "token": 5, "sample": 24},
        **changed,
    }


def test_a_log_line_is_printed_at_the_first_step_every_interval_and_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(first=2, last=7, interval=2)
    for step in range(3, 8):
        changed = {"validation_loss": 2.5 if step == 4 else None, "mfu": 0.421 if step == 7 else None}
        progress.step(record(step, **changed, data_wait=0.3 if step == 6 else 0.01))
    progress.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split(" ")[1] for line in lines] == ["3/7", "4/7", "6/7", "7/7"]
    for said in (
        "loss 3.1416",
        "lr 1.00e-04",
        "98,765 tokens/s",
        "1.2 GiB",
        "train-00002.parquet row 17 token 5",
        "ETA",
    ):
        assert said in lines[0], said
    # The newest held-out loss stays in sight; MFU is said where it is known.
    assert ["(held-out 2.5000)" in line for line in lines] == [False, True, True, True]
    assert "MFU" not in lines[0]
    assert "MFU 42.1%" in lines[3]
    assert lines[3].endswith("ETA 00:00")
    # Waiting for data is said where it is worth a word.
    assert ["waited 15% for data" in line for line in lines] == [False, False, True, False]
