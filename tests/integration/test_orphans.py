"""Whoever starts processes of a job, and is killed at any moment, takes them along."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import command, draws, finish, marked, metrics, outlive, ranks_of, start, wait_for_steps

pytestmark = pytest.mark.slow
ENDLESS = {"--total-steps": 100_000, "--save-interval": 50}


def wait_for_ranks(job: subprocess.Popen[str], without: tuple[int, ...] = ()) -> None:
    deadline = time.monotonic() + 120
    while not set(ranks_of(job).values()) - set(without):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.01)


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_launcher_killed_at_any_moment_takes_its_ranks_along(
    flags: dict[str, Any], tmp_path: Path, torchrun: bool
) -> None:
    draw = draws()
    flags = {**flags, **ENDLESS, "--output-dir": tmp_path}
    # While the interpreter starts, while it imports, and while the ranks meet, train or save.
    for moment in (0.0, draw.uniform(0, 1), draw.uniform(1, 4), draw.uniform(4, 9)):
        mark = uuid.uuid4().hex
        job = start(command("pretrain", flags, torchrun=torchrun), MARK=mark)
        wait_for_ranks(job)
        time.sleep(moment)
        os.kill(job.pid, signal.SIGKILL)
        job.communicate(timeout=30)  # the ranks hold its output open until they end
        assert outlive(marked(mark), seconds=5) == [], (
            f"a rank outlived its launcher, killed {moment} s after its start"
        )
    done = metrics(tmp_path)[-1]["step"] if metrics(tmp_path) else 0
    again = finish(start(command("pretrain", {**flags, "--stop-at-step": done + 2}, torchrun=torchrun)))
    assert again.status == 0, again.output


def test_a_launcher_killed_while_its_ranks_start_again_takes_them_along(flags: dict[str, Any], tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    words = command("pretrain", {**flags, **ENDLESS, "--output-dir": tmp_path, "--max-restarts": 2})
    job = start(words, MARK=mark)
    wait_for_steps(job, tmp_path, 2)
    first = tuple(ranks_of(job).values())
    os.kill(first[0], signal.SIGKILL)
    wait_for_ranks(job, without=first)
    time.sleep(draws().uniform(0, 3))
    os.kill(job.pid, signal.SIGKILL)
    job.communicate(timeout=30)
    assert outlive(marked(mark), seconds=5) == [], "a rank outlived its launcher"


def test_processes_that_tokenise_go_with_the_one_they_work_for(flags: dict[str, Any], tmp_path: Path) -> None:
    draw = draws()
    flags = {**flags, "--no-streaming": None, "--num-proc": 3, "--stop-at-step": 1, "--output-dir": tmp_path}
    for moment in (0.0, draw.uniform(0, 4)):
        mark = uuid.uuid4().hex
        job = start(command("pretrain", flags, nproc=1), MARK=mark)
        while len(marked(mark)) < 4 and job.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        os.kill(job.pid, signal.SIGKILL)
        job.communicate(timeout=30)
        assert outlive(marked(mark), seconds=5) == [], f"killed {moment} s after they were started"
    assert finish(start(command("pretrain", flags, nproc=1))).status == 0
