"""Jobs of their own processes: started, watched by the steps that they log, and killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argonne.parent import as_parent

ROOT = Path(__file__).parents[1]


def start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a job; what it prints is appended to ``log``."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output, as_parent():
        return subprocess.Popen(words, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT)


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The complete lines of ``metrics.jsonl``; none while there is no such file."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def descendants(pid: int) -> list[int]:
    """Every process below ``pid``, and ``pid`` itself."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [(int(child), int(parent)) for child, parent in (line.split() for line in listed.splitlines())]
    found = [pid]
    for parent in found:  # grows as it is walked
        found += [child for child, above in parents if above == parent]
    return found


def kill(job: subprocess.Popen[bytes]) -> None:
    """SIGKILL for every process of a job at once, and wait until none of them runs."""
    processes = descendants(job.pid)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    job.wait()
    while any(runs(process) for process in processes):
        time.sleep(0.05)


def runs(process: int) -> bool:
    """Whether there is such a process, and it has not ended; one that nobody has waited for is left as a zombie."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return found.stdout.strip()[:1] not in ("", "Z")


def run_until(words: Sequence[str], directory: Path, log: Path, last: int | None) -> int:
    """Run a job until it has logged step ``last`` and kill it then, or to its end; returns the last step logged."""
    job = start(words, log)
    try:
        while last is not None and job.poll() is None:
            steps = metrics(directory)
            if steps and steps[-1]["step"] >= last:
                kill(job)
                return metrics(directory)[-1]["step"]
            time.sleep(0.02)
        job.wait()
    except BaseException:  # whoever waits is stopped, and so is the job
        kill(job)
        raise
    if job.returncode:
        raise SystemExit(
            f"{' '.join(words)}\nended with status {job.returncode}:\n{log.read_text('utf-8', errors='replace')}"
        )
    return metrics(directory)[-1]["step"]
