"""Programs for a GPU run from end to end where there is none, or say in one line why they cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
can_pretend = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available() or shutil.which("cc") is None,
    reason="needs a PyTorch built for CUDA, no GPU, and a C compiler",
)


def pretend(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.null_gpu", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a PyTorch that is not built for CUDA")
def test_a_pytorch_without_cuda_is_refused_in_one_line() -> None:
    done = pretend("-m", "benchmarks.kernels")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"null GPU: error: torch {torch.__version__} is not built for CUDA; legal: one that is")


def test_nothing_to_run_is_refused_in_one_line() -> None:
    done = pretend()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "null GPU: error: there is nothing to run; legal: a script or -m and a module, and its flags"
    ]


@pytest.mark.slow
@can_pretend
def test_kernels_are_launched_and_timed(tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        "--kernel": "swiglu",
        "--rounds": 1,
        "--tokens": 128,
        "--output": tmp_path / "kernels.json",
    }
    done = pretend("-m", "benchmarks.kernels", *(word for flag in flags.items() for word in flag))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["environment"]["gpu"] == "null GPU"
    assert all(record["contestants"]["argonne"]["median_us"] > 0 for record in report["records"])


@pytest.mark.slow
@can_pretend
def test_a_step_of_every_contestant_runs(tmp_path: Path) -> None:
    flags = {"--device": "cuda", "--preset": "demo", "--sequence": 128, "--micro-batch": 1, "--rounds": 1, "--steps": 1}
    words = [word for flag in flags.items() for word in flag]
    done = pretend("benchmarks/pretrain_step.py", *words, "--output", tmp_path / "step.json")
    assert done.returncode == 0, done.stderr
    contestants = json.loads((tmp_path / "step.json").read_text())["contestants"]
    assert len(contestants) == 8
    assert {name: own["failure"] for name, own in contestants.items() if own["failure"]} == {}
