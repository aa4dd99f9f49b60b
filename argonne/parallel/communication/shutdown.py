"""Leaving a job: Gloo's threads must have let go of every tensor before the interpreter ends.

A thread that has run a collective drops its tensors a moment after everybody else has gone on, and needs the
interpreter's lock for that. One that asks for the lock while the interpreter ends aborts the whole process, with status
134 and all its work done (PyTorch 2.13, issue 190489): on a busy machine, one program in twenty.
"""

from __future__ import annotations

import time
from pathlib import Path

_TASKS = Path("/proc/self/task")
_THREADS = "pt_gloo_runloop"
_LOOKS, _APART = 3, 0.002  # seconds
_AT_MOST = 10.0  # seconds


def wait_for_gloo() -> None:
    """Wait until no thread of Gloo's has anything in hand; to be called when every collective has completed.

    One that waits for the interpreter's lock gets it here, between two looks. Where threads cannot be looked at, as
    they can on Linux, they get a tenth of a second.
    """
    if not _TASKS.exists():
        time.sleep(0.1)
        return
    deadline, calm = time.monotonic() + _AT_MOST, 0
    while calm < _LOOKS and time.monotonic() < deadline:
        time.sleep(_APART)
        calm = 0 if _busy() else calm + 1


def _busy() -> bool:
    """Whether a thread of Gloo's is doing anything but wait."""
    for task in _TASKS.iterdir():
        try:
            status = (task / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has just ended
            continue
        name, state = status.partition("(")[2].rpartition(") ")[::2]
        if name == _THREADS and not state.startswith("S"):
            return True
    return False
