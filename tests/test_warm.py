"""A warm process ends as a fresh one would, and none outlives its servers."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.runs import outlive
from tests.warm import ROOT, Servers, environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fresh processes serve elsewhere")

ENDS = {
    "the end": ("", 0, ""),
    "a number": ("raise SystemExit(7)", 7, ""),
    "a word": ("raise SystemExit('no more')", 1, "no more\n"),
    "an error": ("raise ValueError('bad')", 1, "ValueError: bad\n"),
    "a signal": ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    "atexit": ("import atexit; atexit.register(print, 'last')", 0, "last\n"),
    "a thread": ("import threading; threading.Timer(0.1, print, ['late']).start()", 0, "late\n"),
}


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    made = Servers()
    yield made
    made.close()


@pytest.mark.parametrize("name", ENDS)
def test_status_and_output_are_those_of_the_interpreter(servers: Servers, tmp_path: Path, name: str) -> None:
    code, status, told = ENDS[name]
    script = tmp_path / "script.py"
    script.write_text(code)
    found, output = servers.run([str(script)], environment(), timeout=30)
    assert found == status
    assert output.endswith(told) if told else not output


def test_what_it_sees_is_its_own(servers: Servers, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(os.environ['SEEN'], sys.argv[1:], os.getcwd(), sys.path[0], __name__)")
    _, output = servers.run([str(script), "a", "b c"], environment(SEEN="yes"), timeout=30)
    assert output == f"yes ['a', 'b c'] {ROOT} {tmp_path} __main__\n"


def test_two_ranks_do_not_share_a_hash_seed(servers: Servers, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print(hash('a'))")
    assert len({servers.run([str(script)], environment(RANK=rank), timeout=30)[1] for rank in "01"}) == 2


def test_one_that_takes_too_long_is_killed_and_no_other(servers: Servers, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, time; print('pid', os.getpid(), flush=True); time.sleep(100)")
    with tempfile.TemporaryFile() as output:
        other = servers.start([str(script)], environment(), output.fileno())
    with pytest.raises(AssertionError, match="still running after 1 s:\npid") as told:
        servers.run([str(script)], environment(), timeout=1)
    assert outlive([int(str(told.value).split()[-1])]) == []
    assert other.poll() is None
    servers.close()
    assert outlive([other.pid]) == []


def test_what_a_launcher_started_goes_with_it(servers: Servers, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import time; time.sleep(100)")
    with tempfile.TemporaryFile() as output:
        rank = servers.start([str(script)], environment(), output.fileno())
    rank._server.close()  # as when the process that asked has ended
    assert outlive([rank.pid]) == []
