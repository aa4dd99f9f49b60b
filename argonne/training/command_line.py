"""From a command line to running ranks: parsing, launching, and refusing in one line."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist
import tyro

import argonne
from argonne.output import steady_output
from argonne.parallel.errors import ArgonneError
from argonne.training.config import ParallelFlags


class HasParallelFlags(Protocol):
    """A configuration that says how many processes to start."""

    @property
    def parallel(self) -> ParallelFlags: ...


ConfigType = TypeVar("ConfigType", bound=HasParallelFlags)

USAGE, PEER_LOST, INTERRUPTED = 2, 3, 130
"""Exit statuses: refused input; another process of the job is gone; Ctrl-C."""

STARTED_AT = "ARGONNE_STARTED_AT"
"""Tells the ranks when their launcher began, in seconds since the epoch."""

RESTARTS_LEFT = "ARGONNE_RESTARTS_LEFT"
"""Tells the ranks that ``drive`` started how often it would still start them again."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_REFUSED = "argonne/refused"
"""Is in the store of a job that a rank has refused."""
_FIRST_RANK_SPEAKS_WITHIN = 20.0  # seconds
_LAUNCHER_LOOKS_WITHIN = 2.0  # seconds; a launcher has then acted on the rank that failed first
_MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


def parse(config_type: type[ConfigType], arguments: Sequence[str]) -> ConfigType:
    """The configuration that ``arguments`` describe.

    Raises:
        ArgonneError: an unknown flag or an unusable value, in one line.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(config_type, args=arguments, config=_MARKERS)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ArgonneError(_one_line(told.getvalue())) from None


def drive(main: Callable[[ConfigType], None], check: Callable[[ConfigType, int], None], config: ConfigType) -> None:
    """Run ``main(config)`` on every rank, starting the ranks unless a launcher has.

    ``check(config, world size)`` is what can be refused before any rank is started.
    """
    # What is not a training run (a benchmark, an example) may have no such flag.
    restarts = getattr(config.parallel, "max_restarts", 0)
    if restarts < 0:
        raise ArgonneError(f"max_restarts={restarts} is not legal; legal: 0 or more")
    if "WORLD_SIZE" in os.environ:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _end_with_launcher()
        if restarts and RESTARTS_LEFT not in os.environ:
            raise ArgonneError(
                f"max_restarts={restarts} is for ranks that this command starts itself, but a launcher did; "
                f"legal: the launcher's own flag, torchrun --max-restarts {restarts} ..."
            )
        check(config, world_size())
        main(config)
        return
    gpus = 0 if config.parallel.device == "cpu" else torch.cuda.device_count()
    processes = config.parallel.nproc or max(gpus, 1)
    if gpus and processes > gpus:
        raise ArgonneError(f"nproc={processes} is more than this machine's GPUs; legal: 1 to {gpus}, or --device cpu")
    check(config, processes)
    if processes == 1 and not restarts:
        main(config)
    else:
        _launch(processes, restarts)


def world_size() -> int:
    """The number of ranks that the launcher's environment tells of; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def seconds_since_start() -> float:
    """How long this command has been running, its launcher and what was before a restart included."""
    if STARTED_AT in os.environ:
        return time.time() - float(os.environ[STARTED_AT])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError, ValueError, IndexError):  # no /proc: this rank's own time must do
            return _age(os.getppid())
    return time.time() - argonne.STARTED


def restarts_left() -> int:
    """How often the launcher would still start this job's ranks again if one of them failed."""
    if RESTARTS_LEFT in os.environ:
        return int(os.environ[RESTARTS_LEFT])
    done, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return most - done


def guarded(body: Callable[[], None]) -> None:
    """Run a driver's ``body``; end the process with one clear line, from one rank, for what went wrong."""
    steady_output()
    try:
        body()
    except ArgonneError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        _refuse(str(error))
    except (dist.DistError, RuntimeError) as error:
        if not _is_lost_peer(error):
            raise
        if _was_refused():
            _end_torchrun()
            _leave(USAGE)
        reason = str(error).strip().splitlines()[0][:160]
        _say(f"rank {os.environ.get('RANK', '0')} lost contact with another rank and stops: {reason}")
        time.sleep(_LAUNCHER_LOOKS_WITHIN)
        _leave(PEER_LOST)


def _age(pid: int) -> float:
    """Seconds since a process was started."""
    after_its_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    started = int(after_its_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5): ticks since the boot
    return float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0]) - started


def _end_with_launcher() -> None:
    """End this rank when the launcher that started it is killed: an orphan would go on writing to the run."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.2)
        _leave(PEER_LOST)

    threading.Thread(target=watch, name="argonne-launcher-watch", daemon=True).start()


def _launch(processes: int, max_restarts: int) -> None:
    """Start this same command as ``processes`` ranks, as torchrun would, and wait for them.

    When a rank fails, all are started again, at most ``max_restarts`` times. The loop is here and not in the
    agent because the agent would also repeat what was refused, and would not say what happened.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it in one line
    try:
        tempfile.gettempdir()  # the agent keeps a directory there
    except OSError as error:  # a full disk, usually
        raise ArgonneError(f"{error.strerror}; legal: TMPDIR=DIRECTORY, of a disk that has room") from error
    os.environ.setdefault(STARTED_AT, str(argonne.STARTED))
    # Ranks that share a CPU must not each start a thread for every core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    for left in range(max_restarts, -1, -1):
        os.environ[RESTARTS_LEFT] = str(left)
        failure = _attempt(processes)
        if failure is None:
            return
        status, what = failure
        if status in (USAGE, INTERRUPTED):
            _leave(status)
        if left:
            again = f"{left - 1} restart{'' if left == 2 else 's'} left"
            _say(f"{what}; starting again from the newest checkpoint, {again}")
    _say(f"{what}; the job was stopped. The same command continues the run.")
    _leave(status if status > 0 else 1)


def _attempt(processes: int) -> tuple[int, str] | None:
    """Run the ranks once. For the first that failed, its status (negative: the signal) and one clause that names it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(launch, sys.executable)(*sys.argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"exited with status {failure.exitcode}"
        if failure.exitcode < 0:
            how = f"was killed by {signal.Signals(-failure.exitcode).name}"
        return failure.exitcode, f"rank {rank} (pid {failure.pid}) {how}"
    except SignalException as stop:
        _say(f"stopped by {stop.sigval.name}. The same command continues the run.")
        _leave(128 + stop.sigval)
    return None


def _refuse(message: str) -> NoReturn:
    """Say ``message`` from the first rank only, then end with status 2.

    Every rank refuses the same input by itself. The others wait for the launcher to end them, so that it
    does not end the first rank before it has spoken; if it never does, the fault was this rank's alone, or
    its node's, whose launcher hears nothing from the first: then the node's first rank speaks for it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        time.sleep(_FIRST_RANK_SPEAKS_WITHIN + (0.0 if first_here else _LAUNCHER_LOOKS_WITHIN))
        message = f"rank {rank}: {message}"
    _say(f"error: {message}")
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.distributed_c10d._get_default_store().set(_REFUSED, "")
    _end_torchrun()
    _leave(USAGE)


def _was_refused() -> bool:
    """Whether a rank that is gone has refused something: then this one must not be started again either.

    Its agent would, and wait for the other node's, which has ended, for as long as a rendezvous may take.
    """
    with contextlib.suppress(RuntimeError):  # the store may be gone with the agent that kept it
        return dist.is_initialized() and dist.distributed_c10d._get_default_store().check([_REFUSED])
    return False


def _end_torchrun() -> None:
    """End the agent of this node: it repeats whatever failed, whatever its status, and so would repeat a refusal."""
    if "TORCHELASTIC_RUN_ID" in os.environ and RESTARTS_LEFT not in os.environ and restarts_left():
        os.kill(os.getppid(), signal.SIGTERM)


def _is_lost_peer(error: Exception) -> bool:
    words = (
        "connection closed by peer",
        "connection reset",
        "broken pipe",
        "timed out",
        "nccl",
        "read error",
    )
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _say(line: str) -> None:
    print(f"argonne: {line}", file=sys.stderr, flush=True)


def _leave(status: int) -> NoReturn:
    """End at once: an orderly exit would wait for communication threads whose peers may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _one_line(report: str) -> str:
    """The parser's framed report as one line, without the pointer to ``--help``."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", report)
    lines = [line.strip(" │|") for line in text.splitlines()]
    kept = []
    for line in lines:
        if re.match(r"^[─-]{3,}$", line):
            break
        if line and not re.match(r"^[╭╰]", line):
            kept.append(line)
    return (" ".join(kept) or "unusable arguments") + " (--help lists the flags)"
