"""A rank fails: all start again by themselves, and the run is the one that nothing disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import (
    ROOT,
    Finished,
    agents,
    command,
    draws,
    finish,
    history,
    ranks_of,
    run,
    start,
    succeed,
    wait_for_steps,
    weights,
)

pytestmark = pytest.mark.slow


def kill_one_rank(job: subprocess.Popen[str], draw: random.Random) -> tuple[int, int]:
    """SIGKILL a rank drawn at random; returns it and its process id."""
    deadline = time.monotonic() + 120
    while len(found := ranks_of(job)) < 2:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    rank = draw.choice(sorted(found))
    os.kill(found[rank], signal.SIGKILL)
    return rank, found[rank]


def said(done: Finished, words: str) -> list[str]:
    return [line for line in done.output.splitlines() if line.startswith("argonne: ") and words in line]


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_job_that_loses_a_rank_comes_back_and_repeats_the_uninterrupted_run_to_the_bit(
    flags: dict[str, Any], uninterrupted: Path, tmp_path: Path, torchrun: bool
) -> None:
    draw = draws()
    own = {} if torchrun else {"--max-restarts": 3}
    words = command("pretrain", {**flags, **own, "--output-dir": tmp_path}, torchrun=torchrun, restarts=3)
    job = start(words)
    steps = draw.randint(1, 11)
    wait_for_steps(job, tmp_path, steps)
    rank, pid = kill_one_rank(job, draw)
    done = finish(job)
    assert done.status == 0, done.output
    assert history(tmp_path) == history(uninterrupted), f"rank {rank} was killed after step {steps}"
    assert weights(tmp_path) == weights(uninterrupted)
    if not torchrun:
        (line,) = said(done, "starting again")
        told = "starting again from the newest checkpoint, 2 restarts left"
        assert line == f"argonne: rank {rank} (pid {pid}) was killed by SIGKILL; {told}"


@pytest.mark.exhaustive
def test_a_rank_killed_while_the_job_starts_again_costs_another_restart(
    flags: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    draw = draws()
    job = start(command("pretrain", {**flags, "--output-dir": tmp_path}, torchrun=True, restarts=3))
    wait_for_steps(job, tmp_path, 5)
    first = kill_one_rank(job, draw)[1]
    while first in ranks_of(job).values():
        time.sleep(0.05)
    time.sleep(draw.uniform(0, 6))  # while they import, meet, load or train
    kill_one_rank(job, draw)
    done = finish(job)
    assert done.status == 0, done.output
    assert history(tmp_path) == history(uninterrupted)


@pytest.mark.exhaustive
def test_when_the_restarts_are_used_up_the_job_ends_and_the_same_command_continues_it(
    flags: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    draw = draws()
    words = command("pretrain", {**flags, "--output-dir": tmp_path, "--max-restarts": 1})
    job = start(words)
    for steps in (2, 6):
        wait_for_steps(job, tmp_path, steps)
        rank, pid = kill_one_rank(job, draw)
    done = finish(job)
    assert done.status == 1
    assert len(said(done, "starting again from the newest checkpoint, 0 restarts left")) == 1, done.output
    told = "the job was stopped. The same command continues the run."
    assert said(done, f"rank {rank} (pid {pid}) was killed by SIGKILL; {told}"), done.output
    assert finish(start(words)).status == 0
    assert history(tmp_path) == history(uninterrupted)


@pytest.mark.slow
def test_one_process_alone_is_started_again_too(flags: dict[str, Any], tmp_path: Path) -> None:
    job = start(command("pretrain", {**flags, "--output-dir": tmp_path, "--max-restarts": 1}, nproc=1))
    wait_for_steps(job, tmp_path, 5)
    os.kill(ranks_of(job)[0], signal.SIGKILL)
    done = finish(job)
    assert done.status == 0, done.output
    assert [line["step"] for line in history(tmp_path)] == list(range(1, 13))


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_what_is_refused_is_refused_once_whatever_the_restarts(
    flags: dict[str, Any], uninterrupted: Path, torchrun: bool
) -> None:
    bad = {**flags, "--seed": 5, "--output-dir": uninterrupted}
    own = {} if torchrun else {"--max-restarts": 3}
    done = finish(start(command("pretrain", {**bad, **own}, torchrun=torchrun, restarts=3)))
    assert done.status != 0
    assert torchrun or done.status == 2
    assert len(said(done, "holds a different run (seed: 0 -> 5)")) == 1, done.output


@pytest.mark.slow
def test_resuming_comes_back_too_but_only_to_what_a_restart_can_go_on_with(
    flags: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    draw = draws()
    succeed("pretrain", {**flags, "--output-dir": tmp_path, "--stop-at-step": 6})
    once = {
        "reset_optimizer=True": {"--reset-optimizer": None},
        "a single step,": {"--checkpoint-path": tmp_path / "step_00000006"},
        "which is not the checkpoint's run,": {"--output-dir": tmp_path / "other"},
        "force_from_scratch=True": {"--force-from-scratch": None, "--output-dir": tmp_path / "other"},
    }
    for expected, bad in once.items():
        done = run("resume", {"--checkpoint-path": tmp_path, "--max-restarts": 3, **bad})
        assert done.status == 2
        assert said(done, expected), done.output
    job = start(command("resume", {"--checkpoint-path": tmp_path, "--max-restarts": 3}))
    wait_for_steps(job, tmp_path, 9)
    kill_one_rank(job, draw)
    done = finish(job)
    assert done.status == 0, done.output
    assert history(tmp_path) == history(uninterrupted)


def test_restarts_are_asked_of_the_launcher_that_starts_the_ranks(flags: dict[str, Any], tmp_path: Path) -> None:
    words = {**flags, "--output-dir": tmp_path, "--max-restarts": 3}
    done = finish(start(command("pretrain", words, torchrun=True)))
    assert done.status != 0
    assert said(done, "legal: the launcher's own flag, torchrun --max-restarts 3"), done.output
    negative = run("pretrain", {**words, "--max-restarts": -1})
    assert said(negative, "max_restarts=-1 is not legal; legal: 0 or more")


def test_the_time_before_a_restart_counts_as_run() -> None:
    """--wall-time is for the queue's limit, which does not begin anew when the agent starts its ranks again."""
    code = "from argonne.parallel.communication.environment import seconds_since_start; print(seconds_since_start())"
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": str(ROOT)}
    agent = ["bash", "-c", 'sleep 3; "$0" -c "$1"; true', sys.executable, code]
    began = time.monotonic()
    done = subprocess.run(agent, env=environment, capture_output=True, text=True, check=True)
    assert 3 <= float(done.stdout) <= time.monotonic() - began + 0.5


@pytest.mark.exhaustive
def test_a_rank_lost_on_one_node_brings_both_back(flags: dict[str, Any], uninterrupted: Path, tmp_path: Path) -> None:
    draw = draws()
    layout = {"--output-dir": tmp_path, "--tensor-parallel": 2}
    jobs = agents({**flags, **layout}, each=1, restarts=3)
    wait_for_steps(jobs[0], tmp_path, 6)
    victim = draw.choice(jobs)
    (pid,) = ranks_of(victim).values()
    os.kill(pid, signal.SIGKILL)
    for job in jobs:
        done = finish(job)
        assert done.status == 0, done.output
    assert history(tmp_path) == history(uninterrupted)
    assert weights(tmp_path) == weights(uninterrupted)
