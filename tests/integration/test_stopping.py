"""SIGTERM, Ctrl-C, --wall-time and the last step: a run saves, leaves, and says how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import (
    command,
    draws,
    finish,
    history,
    metrics,
    ranks_of,
    run,
    start,
    succeed,
    wait_for_steps,
    weights,
)

pytestmark = pytest.mark.slow
ENDLESS = {"--total-steps": 100_000, "--save-interval": 100_000}


def to_launcher(job: subprocess.Popen[str], number: signal.Signals) -> None:
    job.send_signal(number)


def to_one_rank(job: subprocess.Popen[str], number: signal.Signals) -> None:
    os.kill(ranks_of(job)[1], number)


def to_all(job: subprocess.Popen[str], number: signal.Signals) -> None:
    """As a scheduler does, and a terminal."""
    for pid in (*ranks_of(job).values(), job.pid):
        os.kill(pid, number)


def step_of_the_only_checkpoint(directory: Path) -> int:
    (saved,) = directory.glob("step_????????")
    return int(saved.name.removeprefix("step_"))


@pytest.mark.parametrize(
    ("nproc", "torchrun", "send", "number", "status"),
    [
        (1, False, to_launcher, signal.SIGINT, 130),
        (2, False, to_launcher, signal.SIGTERM, 143),
        pytest.param(2, False, to_one_rank, signal.SIGTERM, 143, marks=pytest.mark.exhaustive),
        pytest.param(2, False, to_all, signal.SIGINT, 130, marks=pytest.mark.exhaustive),
        pytest.param(2, True, to_launcher, signal.SIGTERM, 1, marks=pytest.mark.exhaustive),  # torchrun's own
        (2, True, to_one_rank, signal.SIGTERM, 0),
        (2, True, to_all, signal.SIGINT, 1),
    ],
)
def test_a_signal_saves_where_it_comes_and_no_restart_undoes_it(
    flags: dict[str, Any],
    tmp_path: Path,
    nproc: int,
    torchrun: bool,
    send: Callable[[subprocess.Popen[str], signal.Signals], None],
    number: signal.Signals,
    status: int,
) -> None:
    own = {} if torchrun else {"--max-restarts": 2 * (nproc > 1)}
    long = {**flags, **ENDLESS, **own, "--output-dir": tmp_path}
    job = start(command("pretrain", long, nproc, torchrun, restarts=2))
    wait_for_steps(job, tmp_path, draws().randint(1, 30))
    send(job, number)
    done = finish(job, timeout=60)
    assert done.status == status, done.output
    step = step_of_the_only_checkpoint(tmp_path)
    assert metrics(tmp_path)[-1]["step"] == step, "steps were lost"
    line = f"argonne: stopped by {number.name} at step {step}, saved. The same command continues the run."
    assert done.output.count(line) == 1, done.output
    assert "starting again" not in done.output
    assert torchrun or "Traceback" not in done.output


def test_a_run_stopped_at_random_moments_repeats_the_undisturbed_one_to_the_bit(
    flags: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    """Also before its ranks train, when they leave at once, and in the middle of a save, which is completed."""
    draw = draws()
    words = command("pretrain", {**flags, "--output-dir": tmp_path})
    for _ in range(2):
        job = start(words)
        time.sleep(draw.uniform(0, 8))
        job.send_signal(signal.SIGTERM)
        done = finish(job, timeout=60)
        assert done.status in (0, 143, -signal.SIGTERM), done.output
        assert "Traceback" not in done.output
    job = start(words)
    wait_for_steps(job, tmp_path, draw.randint(3, 8))
    job.send_signal(signal.SIGTERM)
    finish(job, timeout=60)
    last = sorted(tmp_path.glob("step_????????"))[-1]
    assert metrics(tmp_path)[-1]["step"] == int(last.name.removeprefix("step_")), "steps were lost"
    succeed("pretrain", {**flags, "--output-dir": tmp_path})
    assert history(tmp_path) == history(uninterrupted)
    assert weights(tmp_path) == weights(uninterrupted)


def test_wall_time_saves_and_leaves_cleanly(flags: dict[str, Any], tmp_path: Path) -> None:
    long = {**flags, **ENDLESS, "--output-dir": tmp_path}
    began = time.monotonic()
    output = succeed("pretrain", {**long, "--wall-time": 30})
    assert time.monotonic() - began < 30
    step = step_of_the_only_checkpoint(tmp_path)
    assert metrics(tmp_path)[-1]["step"] == step
    assert f"stopped at step {step:,}, saved: --wall-time is near. The same command continues the run." in output


@pytest.mark.parametrize("own", [{}, pytest.param({"--max-restarts": 3}, marks=pytest.mark.exhaustive), None])
def test_a_wall_time_too_short_for_one_step_has_a_status_of_its_own_and_is_not_tried_again(
    flags: dict[str, Any], tmp_path: Path, own: dict[str, Any] | None
) -> None:
    short = {**flags, **(own or {}), "--wall-time": 5, "--output-dir": tmp_path}
    done = finish(start(command("pretrain", short, torchrun=own is None, restarts=3)))
    assert done.status == (1 if own is None else 4), done.output
    lines = [line for line in done.output.splitlines() if line.startswith("argonne: ")]
    assert len(lines) == 1, done.output
    assert lines[0].startswith("argonne: nothing was gained: --wall-time 5 leaves no time for a step and a save after")
    assert not list(tmp_path.glob("step_*"))
    if own == {}:
        least = int(lines[0].rpartition("legal: ")[2].split()[0])
        assert "saved" in succeed("pretrain", {**short, "--wall-time": least})


def contents(directory: Path) -> dict[Path, tuple[int, bytes]]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_asking_a_finished_run_again_says_so_and_changes_nothing(flags: dict[str, Any], tmp_path: Path) -> None:
    run_of = {"pretrain": {**flags, "--output-dir": tmp_path}, "resume": {"--checkpoint-path": tmp_path}}
    succeed("pretrain", {**run_of["pretrain"], "--stop-at-step": 5})
    before = contents(tmp_path)
    for driver, words in run_of.items():
        output = succeed(driver, {**words, "--stop-at-step": 5})
        assert "the run is at step 5 of 12, where --stop-at-step 5 stops: nothing was done." in output
        assert "continuing from" not in output
        done = run(driver, {**words, "--stop-at-step": 3})
        assert done.status == 2
        assert "stop_at_step=3 is before step 5, where the run is; legal: more than 5" in done.output
    done = run("resume", {**run_of["resume"], "--total-steps": 4})
    assert done.status == 2
    assert "total_steps=4 is before step 5, where the run is; legal: more than 5" in done.output
    assert contents(tmp_path) == before

    output = succeed("pretrain", {**run_of["pretrain"], "--stop-at-step": 13})
    assert "note: --stop-at-step 13 lies past the end of the run, which is at step 12" in output
    before = contents(tmp_path)
    for driver, words in run_of.items():
        for more in ({}, {"--stop-at-step": 12}, {"--wall-time": 1}):
            output = succeed(driver, {**words, **more})
            assert "the run is finished:" in output
            assert "is step 12 of 12, and nothing was done.\nTo go on: resume.py --checkpoint-path" in output
            assert "continuing from" not in output
        done = run(driver, {**words, "--stop-at-step": 5})
        assert done.status == 2
        assert "stop_at_step=5 is before step 12, where the run is; legal: none, as the run is finished" in done.output
    assert contents(tmp_path) == before
    assert "continuing from" in succeed("resume", {**run_of["resume"], "--total-steps": 13})
    assert metrics(tmp_path)[-1]["step"] == 13
