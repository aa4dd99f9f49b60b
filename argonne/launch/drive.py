"""From a command line to running ranks: parsing, launching, and refusing in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import re
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
import tyro

from argonne.launch.flags import at_home, help_rules
from argonne.launch.launcher import launch
from argonne.launch.refusal import (
    LAUNCHER_LOOKS_WITHIN,
    PEER_LOST,
    USAGE,
    leave,
    leave_for_good,
    refuse,
    say,
    stopped_status,
    was_refused,
)
from argonne.launch.signals import STOP
from argonne.output import steady_output
from argonne.parallel.communication import environment
from argonne.parallel.errors import ArgonneError
from argonne.training.layout_flags import LayoutFlags


class HasParallelFlags(Protocol):
    """A configuration that says how many processes to start."""

    @property
    def parallel(self) -> LayoutFlags: ...


Parsed = TypeVar("Parsed")
ConfigType = TypeVar("ConfigType", bound=HasParallelFlags)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


def parse(config_type: type[Parsed], arguments: Sequence[str]) -> Parsed:
    """The configuration that ``arguments`` describe, with the ``~`` of every path expanded.

    Where ``config_type.left_out`` says what happens to a field that no flag names, ``--help`` says so too. A
    configuration with a field ``given`` is told there which flags the arguments name.

    Raises:
        ArgonneError: an unknown flag, an unusable value, or a flag with two values, in one line.
    """
    given = named_flags(arguments)
    told = io.StringIO()
    rules = help_rules(getattr(config_type, "left_out", {}))
    try:
        with contextlib.redirect_stderr(told):
            config = at_home(tyro.cli(config_type, args=arguments, config=_MARKERS, registry=rules))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ArgonneError(_one_line(told.getvalue())) from None
    return dataclasses.replace(config, given=given) if hasattr(config, "given") else config  # type: ignore[type-var]


def named_flags(arguments: Sequence[str]) -> frozenset[str]:
    """The fields that a command line names: ``--no-streaming`` and ``--save-interval=5`` as their fields.

    Raises:
        ArgonneError: a flag is named twice and says two things.
    """
    told: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            told.append((flag[2:].replace("_", "-"), [value] if equals else []))
        elif told:
            told[-1][1].append(word)
    said: dict[str, list[str]] = {}
    for flag, values in told:
        if said.setdefault(flag, values) != values:
            first, last = (" ".join(each) for each in (said[flag], values))
            raise ArgonneError(f"--{flag} is given twice, as {first!r} and as {last!r}; legal: once")
    return frozenset(flag.removeprefix("no-").replace("-", "_") for flag in said)


def drive(
    main: Callable[[ConfigType], int | None], check: Callable[[ConfigType, int], None], config: ConfigType
) -> None:
    """Run ``main(config)`` on every rank, starting the ranks unless a launcher has.

    ``check(config, world size)`` is what can be refused before any rank is started. The process ends with the status
    that ``main`` returns, if it is not 0.
    """
    environment.check()
    # What is not a training run (a benchmark, an example) may have no such flag.
    restarts = getattr(config.parallel, "max_restarts", 0)
    if restarts < 0:
        raise ArgonneError(f"max_restarts={restarts} is not legal; legal: 0 or more")
    if environment.place().launched:
        if restarts and not environment.under_driver():
            raise ArgonneError(
                f"max_restarts={restarts} is for ranks that this command starts itself, but a launcher did; "
                f"legal: the launcher's own flag, torchrun --max-restarts {restarts} ..."
            )
        processes, asked = world_size(), config.parallel.nproc
        here = environment.place().local_world_size
        if asked is not None and not environment.under_driver() and asked not in (processes, here):
            raise ArgonneError(
                f"nproc={asked} is for ranks that this command starts itself, but a launcher started {processes}; "
                "legal: leave it out"
            )
    else:
        gpus = 0 if config.parallel.device == "cpu" else torch.cuda.device_count()
        processes = config.parallel.nproc or max(gpus, 1)
        if gpus and processes > gpus:
            raise ArgonneError(
                f"nproc={processes} is more than this machine's GPUs; legal: 1 to {gpus}, or --device cpu"
            )
    check(config, processes)
    if not environment.place().launched and (processes > 1 or restarts):
        launch(processes, restarts)
    elif status := main(config):
        leave_for_good(status)


def world_size() -> int:
    """The number of ranks that the launcher's environment tells of; 1 without a launcher."""
    return environment.place().world_size


def guarded(body: Callable[[], None]) -> None:
    """Run a driver's ``body``; end the process with one clear line, from one rank, for what went wrong."""
    steady_output()
    STOP.listen()
    try:
        body()
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
        say(f"rank {environment.place().rank} lost contact with another rank and stops: {reason}")
        time.sleep(LAUNCHER_LOOKS_WITHIN)
        leave(PEER_LOST)


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
