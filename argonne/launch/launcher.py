"""A driver that starts its own ranks, as torchrun would, and starts them again when one fails."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from typing import NoReturn

import argonne
from argonne.launch.allocation import keep_freed_memory
from argonne.launch.refusal import FINAL, leave, log
from argonne.launch.signals import STOP, heeded
from argonne.parallel.communication.environment import RESTARTS_LEFT, STARTED_AT
from argonne.parallel.errors import ArgonneError
from argonne.parent import PARENT


def launch(processes: int, max_restarts: int, *, on_gpus: bool) -> None:
    """Start this same command as ``processes`` ranks, on GPUs or on CPUs, and wait for them.

    When a rank fails, all are started again, at most ``max_restarts`` times. The loop is here and not in the
    agent because the agent would also repeat what was refused, and would not say what happened.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def stop(number: int, _: object) -> NoReturn:
        raise SignalException("", signal.Signals(number))

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # one line of ours says it
    try:
        tempfile.gettempdir()  # the agent keeps a directory there
    except OSError as error:  # a full disk, usually
        raise ArgonneError(f"{error.strerror}; legal: TMPDIR=DIRECTORY, of a disk that has room") from error
    os.environ[PARENT] = str(os.getpid())
    os.environ.setdefault(STARTED_AT, str(argonne.STARTED))
    # Ranks that share a CPU must not each start a thread for every core.
    if not os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    if not on_gpus:
        keep_freed_memory(os.environ)
    try:
        # The agent, which does the same once it has ranks to hand the signal to, comes too late for those at the start.
        for number in heeded():
            signal.signal(number, stop)
        STOP.hand_over()
        _repeat(processes, max_restarts)
    except SignalException as asked:
        log(f"stopped by {asked.sigval.name}. The same command continues the run.")
        leave(128 + asked.sigval)


def _repeat(processes: int, max_restarts: int) -> None:
    """Attempt it until it succeeds; what cannot be mended by another attempt ends this process."""
    for left in range(max_restarts, -1, -1):
        os.environ[RESTARTS_LEFT] = str(left)
        failure = _attempt(processes)
        if failure is None:
            return
        status, what = failure
        if status in FINAL:
            leave(status)
        if left:
            again = f"{left - 1} restart{'' if left == 2 else 's'} left"
            log(f"{what}; starting again from the newest checkpoint, {again}")
    log(f"{what}; the job was stopped. The same command continues the run.")
    leave(status if status > 0 else 1)


def _attempt(processes: int) -> tuple[int, str] | None:
    """Run the ranks once. For the first that failed, its status (negative: the signal) and one clause that names it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle=",".join(number.name for number in heeded()),
    )
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"exited with status {failure.exitcode}"
        if failure.exitcode < 0:
            how = f"was killed by {signal.Signals(-failure.exitcode).name}"
        return failure.exitcode, f"rank {rank} (pid {failure.pid}) {how}"
    return None
