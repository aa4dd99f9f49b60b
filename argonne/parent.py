"""A process that another one of the job has started ends with it, at any moment of its life.

An orphan would go on writing to a run that the same command has begun to continue, or wait for hours for ranks that are
gone. So this is settled when ``argonne`` is imported, before anything that takes long. Who the parent is, is told by
``PARENT``, never asked of the system: it would name whoever has adopted an orphan. torchrun tells nothing; there
the parent is looked at: an agent has torch in its memory, and who adopts orphans has not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARENT = "ARGONNE_PARENT"
"""Tells a process who has started it: a process id."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LOOKS_EVERY = 0.2  # seconds
_ORPHANED = 3  # the exit status of a rank that has lost another


def end_with_parent() -> None:
    """End this process, now or later, when the one that started it is gone; nothing unless that one is known."""
    if os.environ.get(PARENT, "").isdecimal():
        told = int(os.environ.pop(PARENT))  # it is of no process that this one starts
        dies = _die_with_parent()
        if os.getppid() != told:
            _leave()
        if not dies:
            _watch(os.getppid, told)
    elif "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ:
        # A wrapper's death is its agent's business, and a helper of a rank may have been started by a thread,
        # with which it would die.
        dies = not _is_of_this_rank(os.getppid()) and _die_with_parent()
        launcher = _launcher()
        if _adopts_orphans(launcher):
            _leave()
        if not dies:
            _watch(_launcher, launcher)


@contextmanager
def as_parent() -> Iterator[None]:
    """Processes of ours that are started meanwhile, by this very thread, end with this process."""
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT, None)


def _die_with_parent() -> bool:
    """Have the kernel kill this process with its parent, whatever it is busy with. Only Linux can."""
    try:
        return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    except (OSError, AttributeError, TypeError):
        return False


def _watch(ask: Callable[[], int], expected: int) -> None:
    """End this process when ``ask()`` is no more what it was."""

    def look() -> None:
        while ask() == expected:
            time.sleep(_LOOKS_EVERY)
        os._exit(_ORPHANED)

    threading.Thread(target=look, name="argonne-parent-watch", daemon=True).start()


def _launcher() -> int:
    """The nearest ancestor that is not of this rank, as a wrapper script is, or the rank that a helper is of."""
    pid = os.getppid()
    while pid > 1 and _is_of_this_rank(pid):
        try:
            after_its_name = (
                Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            )
        except OSError:  # it has just ended, and left this process to another
            return 1
        pid = int(after_its_name[1])
    return pid


def _is_of_this_rank(pid: int) -> bool:
    own = {f"{name}={os.environ[name]}".encode() for name in ("TORCHELASTIC_RUN_ID", "RANK")}
    try:
        return own <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return False


def _adopts_orphans(pid: int) -> bool:
    """Whether that is no torchrun agent: the first process, or another that takes in whoever has lost its parent."""
    try:
        Path("/proc/self/maps").read_bytes()
    except OSError:  # nothing can be looked at
        return pid == 1
    try:
        memory = Path(f"/proc/{pid}/maps").read_bytes()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # another user's, or gone
        return pid != 0  # 0: it is outside this container, and cannot be looked at
    if not memory:  # it is just ending, and the kernel will say so
        return False
    if pid == 1:  # an agent may be a container's first process, and so may a program that only has torch too
        names = {Path(os.fsdecode(word)).name.partition(".run")[0] for word in words}
        return not names & {"torchrun", "torch.distributed", Path(sys.argv[0]).name}
    return b"libtorch" not in memory


def _leave() -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"argonne: the launcher of this process is gone, and so it leaves\n")
    os._exit(_ORPHANED)
