"""Nothing that a run tells, and nobody who does not listen, ends it; and telling it costs the same at every save."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import command, history, kill_job, metrics, ranks_of, start, weights
from tests.warm import ROOT, environment

pytestmark = pytest.mark.slow

UNHEARD = (
    "| head -2",
    "> /dev/full 2> /dev/full",
    *(pytest.param(where, marks=pytest.mark.exhaustive) for where in ("> /dev/full", ">&- 2>&-")),
)


@pytest.mark.parametrize("where", UNHEARD)
def test_a_run_that_nobody_hears_is_the_run(
    flags: dict[str, Any], uninterrupted: Path, tmp_path: Path, where: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if where == UNHEARD[0]:  # and reports that cannot be written
        (run / "stats").write_text("a file")
        (run / "loss.png").mkdir()
    words = shlex.join(command("pretrain", {**flags, "--log-interval": 1, "--output-dir": run}))
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{words} {where}"],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if "2>" not in where:
        assert done.stderr.count("warning: standard output: ") == 1, done.stderr
    if where == UNHEARD[0]:
        assert (run / "stats.set-aside").is_file()
        assert (run / "loss.png.set-aside").is_dir()
    assert history(run) == history(uninterrupted)
    assert weights(run) == weights(uninterrupted)


@pytest.mark.exhaustive
def test_memory_does_not_grow_with_the_number_of_saves(flags: dict[str, Any], tmp_path: Path) -> None:
    often = {"--save-interval": 5, "--total-steps": 100_000, "--sample-tokens": 1, "--keep-checkpoints": 2}
    job = start(command("pretrain", {**flags, **often, "--output-dir": tmp_path}))
    stats, deadline = tmp_path / "stats", time.monotonic() + 900
    seen: list[list[int]] = []
    try:
        for saves in (20, 70):
            while not stats.exists() or len(list(stats.iterdir())) < saves:
                assert job.poll() is None, job.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.1)
            told = [Path(f"/proc/{pid}/status").read_text(encoding="utf-8") for _, pid in sorted(ranks_of(job).items())]
            seen.append([int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) // 1024 for text in told])
    finally:
        kill_job(job)
        job.communicate()
    assert len(metrics(tmp_path)) >= 345
    growth = [after - before for before, after in zip(*seen, strict=True)]
    # A figure that is not given back is a megabyte a save: 50.
    assert len(growth) == 2
    assert max(growth) < 25, f"MB of each rank after 20 and after 70 saves: {seen}"
