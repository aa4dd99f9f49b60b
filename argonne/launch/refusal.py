"""How a process of a job ends: its status, the one line that says why, and whether a launcher may repeat it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch.distributed as dist

from argonne.parallel.communication.environment import (
    JobProcess,
    restarts_left,
    this_process,
    under_driver,
    under_torchrun,
)
from argonne.parallel.errors import ArgonneError, LauncherError

T = TypeVar("T")

USAGE, PEER_LOST, NOTHING_GAINED = 2, 3, 4
"""Exit statuses: refused input; another process of the job is gone; ``--wall-time`` was too short for one step."""

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a job to stop. Its exit status is then 128 and the signal's number."""

FINAL = (USAGE, NOTHING_GAINED, *(128 + number for number in STOPPING))
"""Exit statuses after which the same command again would only end in the same way, or was asked to end."""

_REFUSED = "argonne/refused"
"""Is in the store of a job that a rank has refused."""
_LOST = "argonne/lost"
"""Is in the store of a job whose loss of a process a rank has reported: which."""
_TOLD = "argonne/told"
"""Counts, in the store of a job, the ranks that have something to tell of their own."""
_FIRST_RANK_REPORTS_WITHIN = 20.0  # seconds
LAUNCHER_LOOKS_WITHIN = 2.0  # seconds; a launcher has then acted on the rank that failed first


def log(line: str) -> None:
    """One line for people, on standard error."""
    print(f"argonne: {line}", file=sys.stderr, flush=True)


def leave(status: int) -> NoReturn:
    """End at once: an orderly exit would wait for communication threads whose peers may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave_for_good(status: int) -> NoReturn:
    """``leave``, and have no launcher start this again.

    A driver that launched this knows by the status. torchrun repeats whatever ends in another status than 0, so its
    agent on this node is ended; its own status is 1.
    """
    with contextlib.suppress(LauncherError):  # it does not say whether there are restarts
        if under_torchrun() and not under_driver() and restarts_left():
            os.kill(os.getppid(), signal.SIGTERM)
    leave(status)


def stopped_status(number: int) -> int:
    """The status of a process that a signal has stopped: a launcher other than ours must not take it for a fault."""
    ours = under_driver() or not this_process().launched
    return 128 + number if ours else 0


def refuse(error: ArgonneError) -> NoReturn:
    """Report what is wrong from the first rank only, then end with status 2.

    Every rank refuses the same input by itself. The others wait for the launcher to end them, so that it
    does not end the first rank before it has reported; if it never does, the fault was this rank's alone, or
    its node's, whose launcher hears nothing from the first: then the node's first rank reports it.
    """
    here, message = _this_process(), str(error)
    if here.rank != 0:
        # What somebody has set by hand for this very process no other one will report.
        if under_torchrun() or not isinstance(error, LauncherError):
            time.sleep(_FIRST_RANK_REPORTS_WITHIN + (0.0 if here.is_first_here else LAUNCHER_LOOKS_WITHIN))
        message = f"rank {here.rank}: {message}"
    log(f"error: {message}")
    _leave_refused()


def refuse_alone(error: ArgonneError) -> NoReturn:
    """Report what this rank may have met alone, unless another has just reported such a thing; then end with status 2.

    The others, which wait for this one, end without a word.
    """
    if _in_store(lambda store: store.add(_TOLD, 1) == 1, otherwise=True):
        log(f"error: {error}")
    _leave_refused()


def _leave_refused() -> NoReturn:
    _in_store(lambda store: store.set(_REFUSED, ""), otherwise=None)
    leave_for_good(USAGE)


def was_refused() -> bool:
    """Whether a rank that is gone has refused something: then this one must not be started again either.

    Its agent would, and wait for the other node's, which has ended, for as long as a rendezvous may take.
    """
    return _in_store(lambda store: store.check([_REFUSED]), otherwise=False)


def reports_loss() -> bool:
    """Whether this rank is the one that reports the loss of another: the first that finds out.

    Without the store, which goes with the process that kept it, every rank reports for itself.
    """
    own = str(_this_process().rank)
    return _in_store(lambda store: store.compare_set(_LOST, "", own).decode() == own, otherwise=True)


def _in_store(ask: Callable[[dist.Store], T], otherwise: T) -> T:
    """What ``ask`` makes of the job's store; ``otherwise`` where there is none, or it is gone with who kept it."""
    with contextlib.suppress(RuntimeError):
        if dist.is_initialized():
            return ask(dist.distributed_c10d._get_default_store())
    return otherwise


def _this_process() -> JobProcess:
    try:
        return this_process()
    except LauncherError:  # then this process is no rank of anything, and reports for itself
        return JobProcess()
