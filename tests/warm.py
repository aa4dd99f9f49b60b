"""Processes that have imported everything before they are asked for.

A launcher or a rank spends four seconds of CPU on imports before its first step, and a whole run is several of them.
Here a server imports once and forks a process for each script that it is asked to run; what a launcher starts is
forked too. Such a process has its own session, environment, arguments and output. It does not take down what the
server imported when it ends, which would need another second. A fork shares its server's hash seed, so ranks of odd
number come from a second server: what depends on the order of a set shows as between two fresh processes.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOCKET = "server{}.sock"
COUNT = 2  # of servers, between which ranks alternate
EVERYTHING = (
    "argonne.inference.generate",
    "argonne.training.run.resume",
    "argonne.training.run.workflow",
    "matplotlib.pyplot",
    "tiktoken",
    "torch._dynamo",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.launcher.api",
    "torch.utils.checkpoint",
)
"""What a driver imports, at once or when it is first needed."""


class Forked:
    """A process that a server forks; what ``subprocess.Popen`` offers of it is all that a launcher uses.

    Args:
        home: the directory of the servers' sockets.
        words: the script, or ``-m`` and a module, and its arguments.
        environment: all its variables.
        directory: where it runs.
        output: file descriptors of its standard output and standard error.
    """

    def __init__(
        self, home: str, words: list[str], environment: dict[str, str], directory: Path, output: tuple[int, int]
    ) -> None:
        server = int(environment.get("RANK", "0")) % COUNT
        self.returncode: int | None = None
        self._told = b""
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.connect(os.path.join(home, SOCKET.format(server)))
        request = json.dumps({"words": words, "environment": environment, "directory": str(directory)}).encode()
        socket.send_fds(self._server, [len(request).to_bytes(4, "big")], list(output))
        self._server.sendall(request)
        self.pid = int(self._line(None))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = int(self._line(timeout))
            self._server.close()
        return self.returncode

    def _line(self, timeout: float | None) -> bytes:
        """The next line from the server: the process id, then the status."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._told:
            self._server.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-4))
            try:
                more = self._server.recv(64)
            except TimeoutError:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0) from None
            if not more:
                raise ConnectionError("the server of warm processes is gone")
            self._told += more
        line, _, self._told = self._told.partition(b"\n")
        return line


class Servers:
    """Two servers of warm processes, started at the first call and ended with the last test."""

    def __init__(self) -> None:
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._servers: list[subprocess.Popen[bytes]] = []

    def start(self, words: list[str], environment: dict[str, str], output: int) -> Forked:
        """Start a script in the repository's root; what it and its ranks print goes to the descriptor ``output``."""
        # Without the mark of the first job, or whoever kills all that have it would kill the servers.
        home = self._home.name if self._home else self._start_servers({**environment, "MARK": ""})
        return Forked(home, words, environment, ROOT, (output, output))

    def run(self, words: list[str], environment: dict[str, str], timeout: float) -> tuple[int, str]:
        """Run a script to its end; its status, and all that was printed.

        One that takes longer than ``timeout`` seconds is killed and fails the test.
        """
        with tempfile.TemporaryFile() as output:
            process = self.start(words, environment, output.fileno())
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = None
                os.kill(process.pid, signal.SIGKILL)
            output.seek(0)
            told = output.read().decode()
        assert status is not None, f"still running after {timeout} s:\n{told}"
        return status, told

    def close(self) -> None:
        """End the servers, and with them every process of theirs that still runs."""
        for server in self._servers:
            server.communicate()  # the end of its input
        if self._home is not None:
            self._home.cleanup()
        self._home, self._servers = None, []

    def _start_servers(self, environment: dict[str, str]) -> str:
        """Start both servers; returns where their sockets are."""
        self._home = tempfile.TemporaryDirectory(prefix="argonne-")
        for number in range(COUNT):
            words = [sys.executable, "-m", "tests.warm", self._home.name, str(number)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            # In a session of its own: Ctrl-C is for the tests, at whose end the server ends what it has started.
            self._servers.append(subprocess.Popen(words, **pipes, env=environment, cwd=ROOT, start_new_session=True))
        for server in self._servers:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n", "a server of warm processes did not start"
        atexit.register(self.close)
        return self._home.name


SERVERS = Servers()
INTERPRETING = Servers()
"""Of processes in which Triton interprets: it settles that when it is imported, which servers do."""


def environment(**variables: str) -> dict[str, str]:
    """The variables of a command that is no rank of anything, with ``variables``."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    own = {name: value for name, value in os.environ.items() if name not in ranks}
    return {**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}


def _serve(home: str, number: int) -> dict[str, Any]:
    """Answer requests until standard input ends; returns in each forked process, with what it is to run.

    A process is killed when who asked for it is gone: with a launcher go its ranks.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(os.path.join(home, SOCKET.format(number)))
    listener.listen(64)
    _import_everything(home)
    gc.freeze()  # what is there now need not be visited, and so copied, by each fork
    print("ready", flush=True)
    events = selectors.DefaultSelector()
    events.register(listener, selectors.EVENT_READ, "request")
    events.register(sys.stdin, selectors.EVENT_READ, "end")
    running: dict[int, tuple[int, socket.socket]] = {}  # by its pidfd
    while True:
        for key, _ in events.select():
            if key.data == "end":
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            if key.data == "request":
                client, _ = listener.accept()
                size, output, _, _ = socket.recv_fds(client, 4, 2)
                request = json.loads(client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
                with warnings.catch_warnings():  # Python 3.12 warns of Arrow's thread, which can be forked
                    warnings.simplefilter("ignore", DeprecationWarning)
                    pid = os.fork()
                if pid == 0:
                    events.close()
                    _become(request, output, client)
                    return request
                for descriptor in output:
                    os.close(descriptor)
                watch = os.pidfd_open(pid)
                running[watch] = pid, client
                events.register(watch, selectors.EVENT_READ, "ended")
                events.register(client, selectors.EVENT_READ, pid)
            if isinstance(key.data, int) and events.get_map().get(key.fd) == key:  # it has not just ended
                events.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)  # not reaped yet: its end comes after this
            if key.data == "ended":
                pid, client = running.pop(key.fd)
                events.unregister(key.fd)
                with contextlib.suppress(KeyError):
                    events.unregister(client)
                os.close(key.fd)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with client, contextlib.suppress(OSError):  # who asked may be gone
                    client.sendall(b"%d\n" % status)


def _become(request: dict[str, Any], output: list[int], client: socket.socket) -> None:
    """Make of a fork of the server the process that was asked for."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for standard, descriptor in enumerate(output, start=1):
        os.dup2(descriptor, standard)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    client.sendall(b"%d\n" % os.getpid())
    os.closerange(3, 1024)  # the sockets of the server and of its other clients


def _import_everything(home: str) -> None:
    """Import what drivers will need, and let launchers fork their ranks."""
    for module in EVERYTHING:
        importlib.import_module(module)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    def fork(handler: Any, words: tuple[str, ...], environment: dict[str, str]) -> Forked:
        assert words[0] == sys.executable, words
        sys.stdout.flush()
        sys.stderr.flush()
        return Forked(home, list(words[1:]), environment, Path.cwd(), (1, 2))

    subprocess_handler.SubprocessHandler._popen = fork
    # For its events; here it would look among thousands of modules for a fork's outermost frames.
    dynamic_rendezvous.get_method_name = lambda depth=2: "unknown"
    threads = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    assert threads <= {"python", Path(sys.executable).name, "jemalloc_bg_thd"}, f"a fork would lose a thread: {threads}"


def _run(words: list[str]) -> int:
    """Run a script, or with the words ``-m name`` a module, as the interpreter would; returns its status."""
    script, module = words[0], words[1] if words[0] == "-m" else None
    sys.argv, sys.path[0] = (words[1:], os.getcwd()) if module else (words, str(Path(script).parent))
    try:
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    asked = _serve(sys.argv[1], int(sys.argv[2]))
    import argonne

    argonne.STARTED = time.time()
    ended = _run(asked["words"])
    threading._shutdown()  # waits for threads, as the interpreter does before it calls what atexit has
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)
