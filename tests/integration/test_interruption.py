"""Any interruption, same bits."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from argonne.training.evaluation import PROMPT
from argonne.training.schedule import Schedule
from tests.integration.runs import (
    command,
    draws,
    finish,
    history,
    kill_job,
    metrics,
    outlive,
    ranks_of,
    run,
    start,
    succeed,
    wait_for_steps,
    weights,
)

pytestmark = pytest.mark.slow


def test_a_job_killed_at_random_moments_repeats_the_uninterrupted_run_to_the_bit(
    flags: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    draw = draws()
    stops = sorted(draw.sample(range(1, 12), 2))
    for steps in stops:
        job = start(command("pretrain", {**flags, "--output-dir": tmp_path}))
        wait_for_steps(job, tmp_path, steps)
        time.sleep(draw.uniform(0, 0.3))
        kill_job(job)
        job.communicate()
    succeed("pretrain", {**flags, "--output-dir": tmp_path})
    assert history(tmp_path) == history(uninterrupted), f"killed after steps {stops}"
    assert weights(tmp_path) == weights(uninterrupted)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 13))


def test_a_killed_launcher_takes_its_ranks_with_it(flags: dict[str, Any], tmp_path: Path) -> None:
    long = {**flags, "--output-dir": tmp_path, "--total-steps": 100_000, "--save-interval": 100_000}
    job = start(command("pretrain", long, torchrun=True))
    wait_for_steps(job, tmp_path, 1)
    pids = ranks_of(job).values()
    os.kill(job.pid, signal.SIGKILL)
    job.communicate(timeout=10)  # the ranks hold its output open until they end
    assert len(pids) == 2
    assert outlive(pids) == [], "a rank outlived its launcher"


def test_a_second_job_in_the_same_directory_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    long = {**flags, "--output-dir": tmp_path, "--total-steps": 100_000, "--save-interval": 100_000}
    job = start(command("pretrain", long))
    wait_for_steps(job, tmp_path, 1)
    second = run("pretrain", long)
    kill_job(job)
    job.communicate()
    assert second.status == 2
    assert "is in use by another job" in second.output


def test_resume_under_torchrun_repeats_the_uninterrupted_run_to_the_bit(
    flags: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    succeed("pretrain", {**flags, "--output-dir": tmp_path, "--stop-at-step": 6}, torchrun=True)
    assert [line["step"] for line in metrics(tmp_path)][-1] == 6
    succeed("resume", {"--checkpoint-path": tmp_path}, torchrun=True)
    assert history(tmp_path) == history(uninterrupted)
    assert weights(tmp_path) == weights(uninterrupted)


def test_resume_from_a_step_in_the_middle_drops_what_came_after(
    flags: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    succeed("pretrain", {**flags, "--output-dir": tmp_path})
    output = succeed("resume", {"--checkpoint-path": tmp_path / "step_00000004"})
    assert "step_00000008 lies past step 4 and was set aside" in output
    assert history(tmp_path) == history(uninterrupted)
    assert (tmp_path / "samples.md").read_text() == (uninterrupted / "samples.md").read_text()


def test_resume_changes_on_purpose_only_what_it_is_told(flags: dict[str, Any], tmp_path: Path) -> None:
    boolean = {"--disable-gradient-checkpointing": None}
    succeed("pretrain", {**flags, **boolean, "--output-dir": tmp_path, "--stop-at-step": 4})
    told = {"--checkpoint-path": tmp_path, "--stop-at-step": 6, "--batch-size": 4, "--learning-rate": 1e-3, **boolean}
    shown = {"--sample-tokens": 0}
    output = succeed("resume", {**told, **shown, "--reset-optimizer": None, "--rewarmup-steps": 4})
    assert (tmp_path / "samples.md").read_text().endswith(f"\n\n> {PROMPT}\n\n")
    assert "changed from here on: schedule.learning_rate: 0.003 -> 0.001" in output
    lines = metrics(tmp_path)
    assert [line["tokens"] for line in lines] == [128 * step for step in range(1, 7)]
    assert lines[4]["learning_rate"] < lines[5]["learning_rate"] < lines[3]["learning_rate"]
    # Stopped within the warm-up, it goes on with it.
    succeed("resume", {"--checkpoint-path": tmp_path, "--stop-at-step": 7})
    schedule = Schedule(1e-3, 1e-5, 3, 12, rewarmup_after=4, rewarmup_steps=4)
    rates = [line["learning_rate"] for line in metrics(tmp_path)[4:]]
    assert rates == [schedule.learning_rate(number) for number in (5, 6, 7)]


def test_a_damaged_newest_checkpoint_is_passed_over(flags: dict[str, Any], uninterrupted: Path, tmp_path: Path) -> None:
    succeed("pretrain", {**flags, "--output-dir": tmp_path, "--stop-at-step": 8})
    file = next((tmp_path / "step_00000008").glob("optimizer-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(bytes(content))
    output = succeed("pretrain", {**flags, "--output-dir": tmp_path})
    assert "checkpoint step_00000008 is damaged and was passed over: optimizer-00001" in output
    assert history(tmp_path) == history(uninterrupted)


@pytest.mark.parametrize("torchrun", [pytest.param(True, marks=pytest.mark.exhaustive), False])
def test_a_killed_rank_brings_the_job_down_with_a_message_that_names_it(
    flags: dict[str, Any], tmp_path: Path, torchrun: bool
) -> None:
    long = {**flags, "--output-dir": tmp_path, "--total-steps": 100_000, "--save-interval": 100_000}
    job = start(command("pretrain", long, torchrun=torchrun))
    wait_for_steps(job, tmp_path, 2)
    victim = ranks_of(job)[1]
    os.kill(victim, signal.SIGKILL)
    done = finish(job, timeout=30)
    assert done.status != 0
    assert str(victim) in done.output
    assert "rank 1" in done.output or "rank      : 1" in done.output, done.output
    assert "SIGKILL" in done.output
