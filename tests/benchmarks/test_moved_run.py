"""benchmarks/moved_run.py: its command lines are accepted, what it kills is gone, and it measures what it says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from argonne.launch import parse
from argonne.parallel import Layout
from argonne.training.config import RunConfig
from benchmarks.jobs import metrics, run_until, runs
from benchmarks.moved_run import LEGS, Leg, Options, command, compare, draw

JOB = """
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + "/metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": 1, "child": child.pid}) + "\\n" + '{"step": 2')
time.sleep(600)
"""


def lines(losses: list[float], last_batch: str = "c") -> list[dict[str, Any]]:
    hashes = ["a", "b", last_batch]
    return [
        {"step": step, "loss": loss, "grad_norm": 1.5, "batch_hash": batch}
        for step, (loss, batch) in enumerate(zip(losses, hashes, strict=True), start=1)
    ]


@pytest.mark.parametrize("leg", LEGS, ids=lambda leg: leg.name)
def test_every_leg_is_a_command_line_of_pretrain_with_that_layout(tmp_path: Path, leg: Leg) -> None:
    words = command(Options(corpus=tmp_path), leg, tmp_path / "run", tmp_path / "tokenizer")[2:]
    config = parse(RunConfig, words)
    sizes = {"tensor": 1, "pipeline": 1, "data": 1, "context": 1}
    axis, size = leg.name.split(" + ")[0].split()
    sizes[{"TP": "tensor", "PP": "pipeline", "DP": "data"}[axis]] = int(size)
    layout = Layout(**sizes, sequence_parallel="SP" in leg.name)
    assert config.launch.nproc == leg.processes == layout.world_size
    asked = {name: getattr(config.parallel, f"{name}_parallel") or 1 for name in ("tensor", "pipeline", "data")}
    assert asked == {name: sizes[name] for name in asked}
    assert config.parallel.sequence_parallel == layout.sequence_parallel


def test_the_moved_run_visits_every_layout_in_order_and_ends_at_the_last_step() -> None:
    assert [leg.until for leg in LEGS] == sorted({leg.until for leg in LEGS})
    assert LEGS[-1].until == 1.0
    assert (LEGS[0].name, LEGS[0].flags) == (LEGS[1].name, LEGS[1].flags)  # the layout in which every bit stays


def test_a_killed_job_leaves_no_process_and_its_whole_lines_count(tmp_path: Path) -> None:
    words = [sys.executable, "-c", JOB, str(tmp_path)]
    assert run_until(words, tmp_path, tmp_path / "log", 1) == 1
    (line,) = metrics(tmp_path)
    assert not runs(line["child"])
    assert runs(os.getpid())


def test_a_job_that_fails_ends_the_benchmark_with_what_it_said(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "raise SystemExit('no such corpus')"]
    with pytest.raises(SystemExit, match=r"(?s)ended with status 1.*no such corpus"):
        run_until(words, tmp_path, tmp_path / "log", None)


def test_the_comparison_says_how_long_bits_are_equal_and_how_far_losses_part() -> None:
    undisturbed = lines([4.0, 3.0, 2.0])
    same = compare(undisturbed, lines([4.0, 3.0, 2.0]))
    assert (same.equal_bits_until, same.largest_difference, same.same_batches) == (3, 0.0, True)
    parted = compare(undisturbed, lines([4.0, 3.25, 2.125]))
    assert (parted.equal_bits_until, parted.largest_difference, parted.at_step) == (1, 0.25, 2)
    assert parted.largest_relative_difference == 0.25 / 3.0
    assert not compare(undisturbed, lines([4.0, 3.0, 2.0], last_batch="d")).same_batches


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(lines([4.0, 3.0, 2.0]), lines([4.0, 3.0, 2.5]), [1, 3], [2], ["TP 2", "TP 1"], tmp_path / "moved.png")
    assert (tmp_path / "moved.png").read_bytes().startswith(b"\x89PNG")


def test_the_kept_figures_are_those_of_their_losses() -> None:
    kept = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "moved_run_cpu.json").read_text())
    pairs = list(zip(kept["losses"]["undisturbed"], kept["losses"]["moved"], strict=True))
    assert len(pairs) == kept["steps"]
    assert kept["layouts"] == [leg.name for leg in LEGS]
    assert kept["largest_difference"] == max(abs(one - other) for one, other in pairs)
    assert all(one == other for one, other in pairs[: kept["equal_bits_until"]])
    assert kept["same_batches"]
