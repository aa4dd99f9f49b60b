"""Whole runs in processes of their own, on a small corpus of generated text."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.pool import free_port
from tests.warm import ROOT, SERVERS, environment

MODEL = {
    "--preset": "demo",
    "--hidden-size": 24,
    "--num-hidden-layers": 2,
    "--num-attention-heads": 4,
    "--num-key-value-heads": 2,
    "--intermediate-size": 40,
}
SCHEDULE = {
    "--block-size": 32,
    "--initial-batch-size": 2,
    "--gradient-accumulation-steps": 2,
    "--total-steps": 12,
    "--warmup-steps": 3,
    "--learning-rate": 3e-3,
    "--save-interval": 4,
    "--sample-tokens": 8,
}

# What depends on the clock or the memory of the machine, not on the run.
MEASURED = ("tokens_per_second", "step_time", "data_wait", "memory_gib", "mfu")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    status: int
    output: str
    seconds: float


def write_corpus(directory: Path, documents: int = 120, shards: int = 3) -> Path:
    """Parquet shards of documents of random words, the same for every caller."""
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(300)]
    texts = [" ".join(draw.choices(words, k=draw.randint(15, 120))) for _ in range(documents)]
    directory.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        table = pa.table({"id": list(range(len(texts[shard::shards]))), "text": texts[shard::shards]})
        pq.write_table(table, directory / f"part-{shard}.parquet", row_group_size=7)
    return directory


def draws() -> random.Random:
    """What a test draws its moments from; it prints what replays them, and a test that fails shows that."""
    seed = os.environ.get("ARGONNE_TEST_SEED") or str(time.time_ns())
    print(f"to replay what was drawn: ARGONNE_TEST_SEED={seed}")
    return random.Random(seed)


def marked(mark: str) -> list[int]:
    """Every running process of a job that was started with the variable ``MARK=mark``."""
    found = []
    for variables in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            if f"MARK={mark}".encode() in variables.read_bytes().split(b"\0"):
                found.append(int(variables.parent.name))
    return found


def words_of(flags: dict[str, Any]) -> list[str]:
    """Flags as the words of a command line; one whose value is None stands alone, a list is several words."""
    words: list[Any] = []
    for name, value in flags.items():
        words += [name] if value is None else [name, *value] if isinstance(value, list) else [name, value]
    return [str(word) for word in words]


def command(driver: str, flags: dict[str, Any], nproc: int = 2, torchrun: bool = False, restarts: int = 0) -> list[str]:
    """The words of a driver's command line; ``restarts`` are torchrun's."""
    words = words_of(flags)
    script = str(ROOT / "examples" / f"{driver}.py")
    if torchrun:
        agent = {"--standalone": None, "--nproc-per-node": nproc, "--max-restarts": restarts}
        return [sys.executable, "-m", "torch.distributed.run", *words_of(agent), script, *words]
    return [sys.executable, script, "--nproc", str(nproc), *words]


def start(words: list[str], **variables: str) -> subprocess.Popen[str]:
    """Start a command, in the repository's root, as the leader of a process group of its own."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**variables),
        cwd=ROOT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> Finished:
    """Wait for a command's end; one that takes longer than ``timeout`` seconds is killed and fails the test."""
    began = time.monotonic()
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_job(process)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{output}") from None
    return Finished(process.returncode, output, time.monotonic() - began)


def run(driver: str, flags: dict[str, Any], nproc: int = 2, torchrun: bool = False, **variables: str) -> Finished:
    """Run a driver to its end, whatever that is; without torchrun in processes that need not import anything."""
    words = command(driver, flags, nproc, torchrun)
    if torchrun or sys.platform != "linux":
        return finish(start(words, **variables))
    began = time.monotonic()
    status, output = SERVERS.run(words[1:], environment(**variables), timeout=300)
    return Finished(status, output, time.monotonic() - began)


def succeed(driver: str, flags: dict[str, Any], nproc: int = 2, torchrun: bool = False) -> str:
    """Run a driver that must succeed; returns what it printed."""
    done = run(driver, flags, nproc, torchrun)
    assert done.status == 0, done.output
    return done.output


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The complete lines of ``metrics.jsonl``."""
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def history(directory: Path) -> list[dict[str, Any]]:
    """Everything about a run's steps that must repeat to the bit."""
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in metrics(directory)]


def weights(directory: Path) -> dict[str, str]:
    """The hash of every whole tensor of the newest checkpoint."""
    newest = sorted(directory.glob("step_????????"))[-1]
    return {
        name: record["sha256"] for name, record in json.loads((newest / "manifest.json").read_text())["tensors"].items()
    }


def wait_for_steps(process: subprocess.Popen[str], directory: Path, steps: int, timeout: float = 200) -> None:
    """Wait until a run has logged ``steps`` steps."""
    deadline = time.monotonic() + timeout
    path = directory / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {steps} steps within {timeout} s"
        time.sleep(0.01)


def kill_job(process: subprocess.Popen[str]) -> None:
    """SIGKILL every process of a job at once: nothing is tidied up, though the disk still gets what was written."""
    pids = [process.pid, *ranks_of(process).values()]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run_until_killed(driver: str, flags: dict[str, Any], steps: int, nproc: int = 2, timeout: float = 200) -> None:
    """Run a driver until it has logged ``steps`` steps more, or has ended; then SIGKILL all processes of its job."""
    log = flags["--output-dir"] / "metrics.jsonl"
    before = set(log.read_text().splitlines()) if log.exists() else set()
    mark, deadline = str(time.time_ns()), time.monotonic() + timeout
    with tempfile.TemporaryFile() as output:
        job = SERVERS.start(command(driver, flags, nproc)[1:], environment(MARK=mark), output.fileno())
        try:
            while job.poll() is None and len(_more(log, before)) < steps:
                assert time.monotonic() < deadline, f"no {steps} steps within {timeout} s"
                time.sleep(0.01)
        finally:
            while pids := marked(mark):
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                outlive(pids)
        output.seek(0)
        assert _more(log, before), output.read().decode()


def _more(log: Path, before: set[str]) -> list[str]:
    """The complete lines of a log that were not there before: they say how long a step took, and so differ."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [line for line in lines if line.endswith("\n") and line.rstrip("\n") not in before]


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """The process id of each rank that a launcher has started."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    found = {}
    for pid in map(int, children.stdout.split()):
        with contextlib.suppress(OSError):  # it has just ended
            variables = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
            found |= {int(variable[5:]): pid for variable in variables if variable.startswith(b"RANK=")}
    return found


def outlive(pids: Iterable[int], seconds: float = 20) -> list[int]:
    """Those of ``pids`` that still run after a while; a process that is ending may take a moment."""
    deadline, left = time.monotonic() + seconds, list(pids)
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        stats = {pid: Path(f"/proc/{pid}/stat") for pid in left}
        left = [pid for pid, stat in stats.items() if stat.exists() and stat.read_text().split()[2] != "Z"]
    return left


def agents(
    flags: dict[str, Any],
    each: int = 2,
    restarts: int = 0,
    script: Path = ROOT / "examples" / "pretrain.py",
    host: int | None = None,
) -> list[subprocess.Popen[str]]:
    """Two torchrun agents of ``each`` ranks that meet at a port of this machine; agent ``host`` keeps the store."""
    launcher = {
        "--nnodes": 2,
        "--nproc-per-node": each,
        "--max-restarts": restarts,
        "--rdzv-backend": "c10d",
        "--rdzv-id": "nodes",
        "--rdzv-endpoint": f"127.0.0.1:{free_port()}",
    }
    driver = [str(script), *words_of(flags)]
    each_hosts = [{} if host is None else {"--rdzv-conf": f"is_host={int(node == host)}"} for node in range(2)]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [start([*torchrun, *words_of({**launcher, **hosts}), *driver]) for hosts in each_hosts]
