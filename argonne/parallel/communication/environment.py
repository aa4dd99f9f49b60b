"""What a launcher tells its processes in their environment: read, and checked, here.

A launcher is torchrun, a scheduler, a shell script, or a driver that starts its ranks itself. Only ``argonne.parent``,
which must know its parent before torch is imported, looks at two of the same variables by itself.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import argonne
from argonne.parallel.errors import LauncherError
from argonne.parent import PARENT

STARTED_AT = "ARGONNE_STARTED_AT"
"""Tells the ranks when their launcher began, in seconds since the epoch."""

RESTARTS_LEFT = "ARGONNE_RESTARTS_LEFT"
"""Tells the ranks that a driver started how often it would still start them again."""

_RESOLVES_WITHIN = 5.0  # seconds; a name server may know a machine a moment after it has started
_LONG = 86_400.0  # seconds; no two clocks differ by so much
_YEAR_2001 = 1e9  # seconds since the epoch


@dataclass(frozen=True)
class JobProcess:
    """Which process of the job this is; without a launcher, its only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    """Which of this node's; not every launcher says it."""
    local_world_size: int = 1
    launched: bool = False
    """Whether a launcher has started this process as a rank."""

    @property
    def is_first_here(self) -> bool:
        """Whether no other rank of this node comes before."""
        return not self.local_rank


@dataclass(frozen=True)
class Meeting:
    """Where the ranks find each other."""

    address: str = "127.0.0.1"
    port: int = 29500
    hosted: bool = False
    """Whether torchrun keeps a store there; the first rank does otherwise."""

    @property
    def is_here(self) -> bool:
        """Whether the address means this machine on every machine."""
        return self.address in ("localhost", "::1") or self.address.startswith("127.")

    def __str__(self) -> str:
        return f"MASTER_ADDR={self.address}, MASTER_PORT={self.port}"

    def require_known_host(self) -> None:
        """Raise ``LauncherError`` when the address is of no machine that this one knows."""
        deadline = time.monotonic() + _RESOLVES_WITHIN
        while True:
            try:
                socket.getaddrinfo(self.address, self.port)
                return
            except (OSError, UnicodeError) as error:
                if time.monotonic() > deadline or isinstance(error, UnicodeError):
                    raise LauncherError(
                        f"MASTER_ADDR={self.address!r} is not known to this machine ({error}); "
                        "legal: the name or address of the machine where rank 0 runs"
                    ) from None
            time.sleep(0.5)


def this_process() -> JobProcess:
    """Which process of the job this is.

    Raises:
        LauncherError: RANK, WORLD_SIZE or what goes with them is not usable.
    """
    local_rank = _whole("LOCAL_RANK", 0)
    if local_rank is None:
        local_rank = _whole("SLURM_LOCALID", 0)
    if "WORLD_SIZE" not in os.environ:
        if "RANK" in os.environ:
            raise LauncherError(
                f"RANK={os.environ['RANK']} is set but WORLD_SIZE is not; legal: both, as a launcher sets them, or none"
            )
        return JobProcess(local_rank=local_rank)
    world_size = _whole("WORLD_SIZE", 1)
    assert world_size is not None
    rank = _whole("RANK", 0, world_size - 1)
    if rank is None:
        if world_size > 1:
            raise LauncherError(
                f"WORLD_SIZE={world_size} is set but RANK is not; legal: both, as a launcher sets them, or none"
            )
        rank = 0
    here = _whole("LOCAL_WORLD_SIZE", 1, world_size)
    if here is not None and "LOCAL_RANK" in os.environ and local_rank is not None and local_rank >= here:
        raise LauncherError(
            f"LOCAL_RANK={local_rank} is not legal with LOCAL_WORLD_SIZE={here}; legal: 0 to {here - 1}"
        )
    return JobProcess(rank, world_size, local_rank, here or 1, True)


def meeting() -> Meeting:
    """Where to find the other ranks. Raises ``LauncherError`` when that cannot be."""
    address = os.environ.get("MASTER_ADDR", Meeting.address)
    if not address or address != address.strip():
        raise LauncherError(f"MASTER_ADDR={address!r} is not legal; legal: the machine where rank 0 runs")
    port = _whole("MASTER_PORT", 1, 65535)
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False")
    if hosted not in ("True", "False"):
        raise LauncherError(f"TORCHELASTIC_USE_AGENT_STORE={hosted!r} is not legal; legal: True, False")
    return Meeting(address, Meeting.port if port is None else port, hosted == "True")


def check() -> None:
    """Raise ``LauncherError`` for the first thing that a launcher's environment should not hold."""
    where = this_process()
    found = meeting()
    if where.launched and where.world_size > 1 and not found.hosted:
        found.require_known_host()
    _started_at()
    restarts_left()
    _whole(PARENT, 1)
    threads = os.environ.get("OMP_NUM_THREADS", "")  # OpenMP takes a number for each level of nesting
    if threads and not all(_is_whole(number) and int(number) > 0 for number in threads.split(",")):
        raise LauncherError(f"OMP_NUM_THREADS={threads!r} is not legal; legal: 1 or more")


def under_torchrun() -> bool:
    """Whether an agent has started this process: torchrun's, or a driver's own."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def under_driver() -> bool:
    """Whether a driver has started this process as a rank, by itself."""
    return RESTARTS_LEFT in os.environ


def restarts_left() -> int:
    """How often the launcher would still start this job's ranks again if one of them failed."""
    if under_driver():
        return _whole(RESTARTS_LEFT, 0) or 0
    done, most = (_whole(f"TORCHELASTIC_{name}", 0) or 0 for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return most - done


def seconds_since_start() -> float:
    """How long this command has been running, its launcher and what was before a restart included."""
    if (started := _started_at()) is not None:
        return time.time() - started
    if under_torchrun():
        with contextlib.suppress(OSError, ValueError, IndexError):  # no /proc: this rank's own time must do
            return _age(os.getppid())
    return time.time() - argonne.STARTED


def _started_at() -> float | None:
    value = os.environ.get(STARTED_AT)
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        number = float(value)
        if math.isfinite(number) and _YEAR_2001 <= number <= time.time() + _LONG:
            return number
    raise LauncherError(
        f"{STARTED_AT}={value!r} is not legal; legal: the seconds since the epoch at which the job began (date +%s)"
    )


def _age(pid: int) -> float:
    """Seconds since a process was started."""
    after_its_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    started = int(after_its_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5): ticks since the boot
    return float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0]) - started


def _whole(variable: str, least: int, most: int | None = None) -> int | None:
    """The whole number that a variable holds; None when it is not set."""
    value = os.environ.get(variable)
    if value is None:
        return None
    if _is_whole(value) and least <= int(value) <= (int(value) if most is None else most):
        return int(value)
    legal = f"{least} or more" if most is None else f"{least} to {most}"
    raise LauncherError(f"{variable}={value!r} is not legal; legal: {legal}")


def _is_whole(value: str) -> bool:
    return value.isascii() and value.isdecimal() and len(value) < 10
