"""A store that the processes of one attempt share with nobody else.

torchrun keeps one store for as long as it lives and hands it to every attempt (PyTorch 2.13), so a restarted rank may
find the address of a rank that is dead. The number of restarts tells the attempts apart on one machine only: an agent
that joins the restart of another does not count it. So the first rank makes up a name, and sends it to processes that
have proven to be alive.
"""

from __future__ import annotations

import socket
import sys
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from argonne.parallel.communication.environment import JobProcess, Meeting
from argonne.parallel.errors import LauncherError

_LOOKS_EVERY = 0.05  # seconds
_LOGS_AFTER = 5.0  # seconds without an answer
_LOGS_MISSING_AFTER = 20.0  # seconds: what the others import takes as long as here, or a little longer
_AGENT_ANSWERS_WITHIN = 15.0  # seconds: it has a store before it has ranks
_NEIGHBOUR_ANSWERS_WITHIN = 60.0  # seconds: ranks on one machine are started together


def meet(process: JobProcess, meeting: Meeting, timeout: timedelta) -> dist.Store:
    """A store of this job's processes, new for each attempt (collective over all ranks).

    Raises:
        LauncherError: where the ranks should meet, no store can be.
        torch.distributed.DistError: some rank has not come within ``timeout``.
    """
    if process.rank == 0 and not meeting.hosted:
        store = _host(process, meeting)
        store.set_timeout(timeout)
    else:
        _await_answer(process, meeting, timeout)
        store = dist.TCPStore(meeting.address, meeting.port, process.world_size, is_master=False, timeout=timeout)
    return fresh_store(store, process.rank, process.world_size, timeout)


def _host(process: JobProcess, meeting: Meeting) -> dist.TCPStore:
    """Keep the store in this process, on which the others call."""
    with socket.socket() as probe:  # a store that cannot listen says so in many lines
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", meeting.port))
        except OSError as error:
            raise LauncherError(
                f"MASTER_PORT={meeting.port} cannot be had ({error.strerror}); legal: a port that is free here"
            ) from None
    within = timedelta(seconds=_AGENT_ANSWERS_WITHIN)
    try:
        return dist.TCPStore(
            meeting.address, meeting.port, process.world_size, is_master=True, timeout=within, wait_for_workers=False
        )
    except dist.DistError:
        raise LauncherError(
            f"{meeting} does not lead to rank 0, which listens here; legal: an address of this machine"
        ) from None


def _await_answer(process: JobProcess, meeting: Meeting, timeout: timedelta) -> None:
    """Wait until somebody listens where the ranks meet; the store itself would wait in silence."""
    patience = timeout.total_seconds()
    if meeting.hosted:
        patience = _AGENT_ANSWERS_WITHIN
    elif meeting.is_here:
        patience = _NEIGHBOUR_ANSWERS_WITHIN
    began, logged = time.monotonic(), False
    while True:
        try:
            socket.create_connection((meeting.address, meeting.port), timeout=_LOGS_AFTER).close()
            return
        except OSError as error:
            waited, reason = time.monotonic() - began, error.strerror or error
        if waited > patience:
            raise LauncherError(
                f"nobody answers at {meeting} ({reason}), for {patience:.0f} s; legal: where rank 0 is started too"
            )
        if waited > _LOGS_AFTER and process.is_first_here and not logged:
            logged = True
            _log(f"rank {process.rank} waits up to {patience:.0f} s for rank 0: nobody answers at {meeting} ({reason})")
        time.sleep(_LOOKS_EVERY)


def _log(line: str) -> None:
    print(f"argonne: {line}", file=sys.stderr, flush=True)


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """``store`` under a prefix that is new, and the same on every rank (collective over all ranks).

    Every rank asks under a word of its own that no earlier process can have used. A question that a dead rank left
    behind is answered too, but nobody hears that; the first rank goes on until all living ranks have.

    Raises:
        torch.distributed.DistError: some rank has not come within ``timeout``.
    """
    if rank != 0:
        word = f"argonne/{uuid.uuid4().hex}"
        store.set(f"argonne/asks/{rank}", word)
        store.wait([word], timeout)
        name = store.get(word).decode()
        store.set(f"{name}/heard/{rank}", "")
        return dist.PrefixStore(name, store)

    name = f"argonne/{uuid.uuid4().hex}"
    deadline = time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world_size))
    logs_at = time.monotonic() + _LOGS_MISSING_AFTER
    while missing:
        for other in missing:
            if store.check([f"argonne/asks/{other}"]):
                store.set(store.get(f"argonne/asks/{other}").decode(), name)
        time.sleep(_LOOKS_EVERY)
        missing = [other for other in missing if not store.check([f"{name}/heard/{other}"])]
        if missing and time.monotonic() > logs_at:
            logs_at = deadline
            _log(
                f"rank 0 of {world_size} waits up to {timeout.total_seconds():.0f} s for {len(missing)} more, of which "
                f"rank {missing[0]} is the first"
            )
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError(f"timed out: rank {missing[0]} has not joined within {timeout.seconds} s")
    return dist.PrefixStore(name, store)
