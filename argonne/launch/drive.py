"""A driver's ranks: started unless a launcher has, run, and ended with one clear line for what went wrong."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from argonne.launch.config_file import as_toml
from argonne.launch.flags import LaunchFlags
from argonne.launch.launcher import launch
from argonne.launch.refusal import (
    LAUNCHER_LOOKS_WITHIN,
    PEER_LOST,
    USAGE,
    leave,
    leave_for_good,
    log,
    refuse,
    refuse_alone,
    reports_loss,
    stopped_status,
    was_refused,
)
from argonne.launch.signals import STOP
from argonne.output import steady_output
from argonne.parallel.communication import environment
from argonne.parallel.errors import ArgonneError, OutOfMemory


class Launchable(Protocol):
    """A configuration that says how to start its processes."""

    @property
    def launch(self) -> LaunchFlags:
        """The flags of launching."""


ConfigType = TypeVar("ConfigType", bound=Launchable)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def drive(
    main: Callable[[ConfigType], int | None], check: Callable[[ConfigType, int], None], config: ConfigType
) -> None:
    """Run ``main(config)`` on every rank, starting the ranks unless a launcher has.

    ``check(config, world size)`` is what can be refused before any rank is started. A configuration that ``prints`` is
    printed, and nothing else is done. The process ends with the status that ``main`` returns, if it is not 0.

    Raises:
        ArgonneError: the launcher's environment, or the flags of launching, are not usable.
    """
    environment.check()
    if getattr(config, "prints", False):
        return _print(config)
    flags, launched = config.launch, environment.this_process().launched
    flags.check()
    if launched:
        processes = world_size()
        _check_launched(flags)
    else:
        processes = flags.processes()
    check(config, processes)
    if not launched and (processes > 1 or flags.restarts):
        launch(processes, flags.restarts, on_gpus=flags.gpus > 0)
    elif status := main(config):
        leave_for_good(status)


def _print(config: Any) -> None:
    """Print a configuration that any run could use, on one rank."""
    config.check()
    if environment.this_process().rank == 0:
        print(as_toml(config))


def world_size() -> int:
    """The number of ranks in the launcher's environment; 1 without a launcher."""
    return environment.this_process().world_size


def guarded(body: Callable[[], None]) -> None:
    """Run a driver's ``body``; end the process with one clear line, from one rank, for what went wrong."""
    steady_output()
    STOP.listen()
    try:
        body()
    except OutOfMemory as error:
        refuse_alone(error)
    except ArgonneError as error:
        refuse(error)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        refuse(ArgonneError(str(error)))
    except (dist.DistError, RuntimeError) as error:
        if not _is_lost_peer(error):
            raise
        if STOP.number is not None:  # another rank was asked too, and has left at once
            leave(stopped_status(STOP.number))
        if was_refused():
            leave_for_good(USAGE)
        reason = str(error).strip().splitlines()[0][:160]
        if reports_loss():
            log(f"rank {environment.this_process().rank} lost contact with another rank and stops: {reason}")
        time.sleep(LAUNCHER_LOOKS_WITHIN)
        leave(PEER_LOST)


def _check_launched(flags: LaunchFlags) -> None:
    """Raise ``ArgonneError`` for a flag that only ranks heed which this command starts itself."""
    if environment.under_driver():
        return
    if flags.restarts:
        raise ArgonneError(
            f"max_restarts={flags.restarts} is for ranks that this command starts itself, but a launcher did; "
            f"legal: the launcher's own flag, torchrun --max-restarts {flags.restarts} ..."
        )
    here = environment.this_process()
    if flags.nproc is not None and flags.nproc not in (here.world_size, here.local_world_size):
        raise ArgonneError(
            f"nproc={flags.nproc} is for ranks that this command starts itself, but a launcher started "
            f"{here.world_size}; legal: leave it out"
        )


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
