"""A persistent pool of Gloo ranks: importing torch costs seconds, so the processes are started once."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Listener, wait
from typing import Any

import torch
import torch.distributed as dist

from argonne.parallel import Layout, ProcessGroups
from tests.warm import INTERPRETING, SERVERS, environment

JOINS = 24
"""Jobs that a rank joins before it is replaced: FSDP keeps the groups of those before, and their threads poll."""
TIMEOUT = 300  # seconds for one call: Inductor compiles for a minute and more on a busy machine


class RankPool:
    """Runs a function on every rank of a layout, in real processes over Gloo."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Any]] = []
        self._joined: Layout | None = None
        self._joins = 0

    def run(self, layout: Layout, body: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``body(groups, *arguments)`` on each rank; the results in rank order.

        ``body`` is a function of a module, found there by its name.
        """
        size = layout.world_size
        while len(self._ranks) < size:
            self._ranks.append(_start(len(self._ranks)))
        if layout != self._joined and self._joins == JOINS:
            self.close()
            return self.run(layout, body, *arguments)
        # All ranks of the layout join a new job together, whichever of them were in which one before.
        port = free_port() if layout != self._joined else None
        self._joins += layout != self._joined
        self._joined = layout
        for rank, (_, pipe) in enumerate(self._ranks[:size]):
            pipe.send_bytes(pickle.dumps((rank, port, layout, body.__module__, body.__qualname__, arguments)))
        results: list[Any] = [None] * size
        failures: list[str] = []
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks[:size])}
        while waiting:
            # After one rank has failed the others may wait for it in a collective for ever.
            ready = wait(list(waiting), timeout=TIMEOUT if not failures else 1)
            if not ready:
                failures.append(f"no answer from ranks {sorted(waiting.values())}")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                results[rank], failure = pickle.loads(pipe.recv_bytes())
                if failure:
                    failures.append(f"rank {rank}:\n{failure}")
        if failures:
            self.close()  # the other ranks may be waiting in a collective
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        for process, pipe in self._ranks:
            os.kill(process.pid, signal.SIGKILL)
            pipe.close()
        self._ranks, self._joined, self._joins = [], None, 0


def _start(number: int) -> tuple[Any, Any]:
    """A process that serves, and the pipe to it: a fork of what has imported everything, where that can be had."""
    if sys.platform == "linux":
        with tempfile.TemporaryDirectory() as home, Listener(os.path.join(home, "pipe")) as listener:
            words = ["-m", "tests.pool", os.path.join(home, "pipe")]
            servers = INTERPRETING if os.environ.get("TRITON_INTERPRET") == "1" else SERVERS
            process = servers.start(words, environment(RANK=str(number)), sys.__stderr__.fileno())
            return process, listener.accept()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    spawned = context.Process(target=_serve, args=(there,), daemon=True)
    spawned.start()
    return spawned, here


def _serve(pipe: Any) -> None:
    os.environ.pop("RANK", None)
    torch.set_num_threads(1)
    groups: ProcessGroups | None = None
    answer: Any = None
    while True:
        try:
            rank, port, layout, module, name, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            if port is not None:
                groups = answer = None
                gc.collect()  # models of the last job keep its groups, whose threads poll, in cycles of references
                if dist.is_initialized():
                    dist.destroy_process_group()
                os.environ.update(
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                    RANK=str(rank),
                    WORLD_SIZE=str(layout.world_size),
                )
                if layout.world_size > 1:
                    dist.init_process_group("gloo")
                    groups = ProcessGroups.from_world(layout, "cpu")
                else:
                    groups = ProcessGroups.single()
            body = importlib.import_module(module)
            for part in name.split("."):
                body = getattr(body, part)
            answer = (body(groups, *arguments), None)
        except BaseException:
            answer = (None, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


def free_port() -> int:
    """A port that nothing listened to a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    _serve(Client(sys.argv[1]))
