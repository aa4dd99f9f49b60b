"""Tiny cases of every kernel, a timer for a CPU, and the benchmark as a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.kernel_contestants import Contestant, contestants
from benchmarks.kernel_targets import Case

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BF16 = torch.bfloat16
TINY = {
    "rms_norm": Case("rms_norm", torch.float32, 8, hidden=24),
    "add_rms_norm": Case("add_rms_norm", torch.float32, 8, hidden=24),
    "rope": Case("rope", torch.float32, 8, heads=3, key_value_heads=1, head_dim=10),
    "rope_packed": Case("rope_packed", torch.float32, 8, heads=4, key_value_heads=2, head_dim=10),
    "swiglu": Case("swiglu", torch.float32, 8, feed_forward=20),
    "cross_entropy": Case("cross_entropy", torch.float32, 8, vocabulary=50),
    "linear_cross_entropy": Case("linear_cross_entropy", torch.float32, 8, hidden=24, vocabulary=50),
}


def command(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT
    )


def timed(case: Case) -> dict[str, Contestant | str]:
    """Without the compiler, which takes its time on a CPU."""
    return {name: c for name, c in contestants(case, backend="torch").items() if name != "torch.compile"}
