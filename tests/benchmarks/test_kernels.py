"""The benchmark of the kernels as a command: what it refuses, writes and shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from argonne.parallel import ArgonneError
from benchmarks import kernels
from benchmarks.kernel_contestants import Contestant
from benchmarks.kernel_report import plot_ratios, show
from benchmarks.kernel_targets import KERNELS, Case, verdicts
from benchmarks.kernel_timing import host_microseconds, measure
from benchmarks.kernels import Flags
from tests.benchmarks.kernel_cases import BF16, CPU, TINY, WallTimer, command, timed


def test_timings_without_a_gpu_are_refused_in_one_line() -> None:
    done = command("benchmarks/kernels.py", "--kernel", "swiglu")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "device='cpu' has no timings; legal: cuda" in done.stderr
    assert "python -m benchmarks.kernels --accuracy" in done.stderr


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (Flags(kernel=("softmax",)), "kernel='softmax' is not known; legal: rms_norm, add_rms_norm, rope"),
        (Flags(tokens=100), "tokens=100 is not legal; legal: 128 to 4096, or a multiple of 4096"),
        (Flags(tokens=5000), "tokens=5000 is not legal"),
        (Flags(rounds=0), "rounds=0 is not legal; legal: 1 or more"),
        (Flags(output=Path("x.png")), "output='x.png' is not a JSON file"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags: Flags, expected: str) -> None:
    with pytest.raises(ArgonneError, match=expected):
        kernels.check(flags)


def test_a_run_writes_every_record_and_the_plot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "GraphTimer", lambda device: WallTimer())
    monkeypatch.setattr(kernels, "cases", lambda kernel, dtype, tokens: [replace(TINY[kernel], dtype=dtype)])
    monkeypatch.setattr(kernels, "contestants", timed)
    output = tmp_path / "kernels.json"
    kernels.speed(Flags(kernel=("swiglu", "cross_entropy"), rounds=1, output=output), CPU)
    report = json.loads(output.read_text())
    found = [(record["kernel"], record["direction"]) for record in report["records"]]
    assert found == [(kernel, direction) for kernel in ("swiglu", "cross_entropy") for direction in KERNELS[kernel]]
    assert [host["kernel"] for host in report["host"]] == ["swiglu", "cross_entropy"]
    assert report["environment"]["torch"] == torch.__version__
    assert f"written: {output}" in capsys.readouterr().out


def test_the_report_shows_ratios_and_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = replace(TINY["rms_norm"], dtype=BF16)
    records = [measure(case, "forward", timed(case), CPU, WallTimer(), rounds=2)]
    fused = TINY["linear_cross_entropy"]
    records.append(measure(fused, "both", timed(fused), CPU, WallTimer(), rounds=1))
    records[0]["targets"] = verdicts(Case("rms_norm", BF16, 8192, hidden=24), "forward", {"argonne": 1.0})
    (entrant,) = [c for name, c in timed(case).items() if name == "argonne"]
    assert isinstance(entrant, Contestant)
    host = {"kernel": "rms_norm", "argonne_us": host_microseconds(case, entrant, CPU), "torch_us": 9.0}
    report = {
        "environment": {"gpu": "a GPU", "cpu": "a CPU", "torch": "2", "triton": "3", "liger-kernel": None},
        "dtype": "bfloat16",
        "rounds": 2,
        "records": records,
        "host": [{**host, "target_us": 40.0, "verdict": "missed"}],
    }
    show(report)
    told = capsys.readouterr().out
    for words in (
        "a GPU, torch 2, triton 3",
        "rms_norm forward 8 x 24",
        "liger: not installed",
        "not measured",
        ">= 0.97",
    ):
        assert words in told
    pytest.importorskip("matplotlib")
    assert plot_ratios(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
