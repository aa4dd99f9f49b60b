"""The first signal is a request while somebody is patient, and an end otherwise; a second one is an end."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.warm import SERVERS, environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs processes that have imported torch")

LISTENS = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
from argonne.launch.signals import STOP
STOP.listen()
print("ready", flush=True)
time.sleep(600)
"""
IS_PATIENT = LISTENS.replace(
    'print("ready", flush=True)\ntime.sleep(600)',
    'with STOP.patience():\n'
    '    print("ready", flush=True)\n'
    '    while STOP.number is None:\n'
    '        time.sleep(0.01)\n'
    '    print("asked by", STOP.number.name, flush=True)\n'
    '    time.sleep(600)\n',
)  # fmt: skip
IGNORES = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{LISTENS}"


class Running:
    """A warm process with a script of its own, and what it has said."""

    def __init__(self, code: str, tmp_path: Path, **variables: str) -> None:
        script = tmp_path / "script.py"
        script.write_text(code)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = SERVERS.start([str(script)], environment(**variables), self._output.fileno())
        self.await_words("ready\n")

    def said(self) -> str:
        self._output.seek(0)
        return self._output.read().decode()

    def await_words(self, words: str) -> None:
        deadline = time.monotonic() + 60
        while words not in self.said():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_where_nobody_is_patient_the_first_ends_it_in_one_line(tmp_path: Path, number: signal.Signals) -> None:
    running = Running(LISTENS, tmp_path)
    running.send(number)
    assert running.process.wait(60) == 128 + number
    assert running.said() == f"ready\nargonne: stopped by {number.name}. The same command continues the run.\n"


def test_a_rank_leaves_the_line_to_its_launcher(tmp_path: Path) -> None:
    running = Running(LISTENS, tmp_path, RANK="0", WORLD_SIZE="1")
    running.send(signal.SIGTERM)
    assert running.process.wait(60) == 143
    assert running.said() == "ready\n"


def test_while_somebody_is_patient_one_request_of_several_signals_is_noted_and_a_second_ends_it(tmp_path: Path) -> None:
    running = Running(IS_PATIENT, tmp_path)
    running.send(signal.SIGINT)
    running.await_words("asked by SIGINT\n")
    running.send(signal.SIGTERM)  # at once: a launcher has handed on what a terminal has sent to all
    time.sleep(1.5)
    assert running.process.poll() is None
    running.send(signal.SIGTERM)
    assert running.process.wait(60) == 143


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    running = Running(IGNORES, tmp_path)
    running.send(signal.SIGHUP)
    time.sleep(0.3)
    assert running.process.poll() is None
    running.send(signal.SIGTERM)
    assert running.process.wait(60) == 143
