"""Who has lost its parent ends, whatever it is doing; who has not stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from argonne.parent import PARENT, _adopts_orphans
from tests.integration.runs import draws, outlive
from tests.warm import ROOT, environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's death on Linux only")

STAYS = "import argonne, os; print('here', os.environ.get('ARGONNE_PARENT'), flush=True)"
PARENT_OF_ONE = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; import argonne; time.sleep(600)"],
                         env={**os.environ, **eval(sys.argv[1])})
print(child.pid, flush=True)
time.sleep(600)
"""
AS_RANK = {"TORCHELASTIC_RUN_ID": "some", "RANK": "1", "WORLD_SIZE": "2"}


def ends_as(words: list[str], **variables: str) -> tuple[int, str]:
    done = subprocess.run(words, env=environment(**variables), capture_output=True, text=True, timeout=60, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def test_one_that_is_told_of_its_parent_stays_and_tells_nobody_else() -> None:
    assert ends_as([sys.executable, "-c", STAYS], **{PARENT: str(os.getpid())}) == (0, "here None\n")


def test_one_whose_parent_is_not_who_started_it_leaves_before_anything_else() -> None:
    status, told = ends_as([sys.executable, "-c", STAYS], **{PARENT: "1"})
    assert (status, told) == (3, "argonne: the launcher of this process is gone, and so it leaves\n")


def test_a_rank_of_an_agent_stays_and_so_does_one_behind_a_wrapper() -> None:
    """This process has torch, as an agent has."""
    assert ends_as([sys.executable, "-c", STAYS], **AS_RANK) == (0, "here None\n")
    assert ends_as(["bash", "-c", '"$0" -c "$1"; true', sys.executable, STAYS], **AS_RANK) == (0, "here None\n")


def test_who_adopts_orphans_is_told_from_an_agent() -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        time.sleep(0.2)
        assert [_adopts_orphans(pid) for pid in (1, other.pid, os.getpid())] == [True, True, False]
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("told", ["{'ARGONNE_PARENT': str(os.getpid())}", str(AS_RANK)])
def test_a_parent_killed_at_any_moment_takes_its_child_along(told: str) -> None:
    draw = draws()
    moments = [0.0, *(draw.uniform(0, 0.5) for _ in range(5))]
    for moment in moments:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT_OF_ONE, told], stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
        )
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(moment)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
        assert outlive([child], seconds=10) == [], f"killed after {moment} s"
