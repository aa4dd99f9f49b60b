"""The benchmark of the kernels as a command: what it refuses, writes and shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.parallel import ArgonneError
from benchmarks import kernels
from benchmarks.kernel_contestants import Contestant
from benchmarks.kernel_report import plot_ratios, show
from benchmarks.kernel_targets import KERNELS, Case, verdicts
from benchmarks.kernel_timing import WallTimer, host_microseconds, measure
from benchmarks.kernels import Flags
from tests.benchmarks.kernel_cases import BF16, CPU, TINY, command, timed


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


def test_a_run_keeps_every_record_and_goes_on_with_those_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "small_cases", lambda kernel, dtype, tokens: [replace(TINY[kernel], dtype=dtype)])
    monkeypatch.setattr(kernels, "contestants", lambda case, compiler: timed(case))
    chosen = {kernel: KERNELS[kernel] for kernel in ("swiglu", "cross_entropy")}
    flags = Flags(kernel=tuple(chosen), rounds=1, output=tmp_path / "kernels.json", rehearse=True, resume=True)
    measured = []

    def cut_off(case: Case, direction: str, *more: Any) -> dict[str, Any]:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((case.kernel, direction))
        return measure(case, direction, *more)

    monkeypatch.setattr(kernels, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        kernels.speed(flags, CPU)
    assert not read(flags)["complete"]
    assert len(read(flags)["cases"]) == 4  # and a call on the host
    before = list(measured)
    measured.clear()
    kernels.speed(flags, CPU)
    assert before + measured == [(kernel, direction) for kernel in chosen for direction in chosen[kernel]]
    report = read(flags)
    assert [name for name in report["cases"] if "host" in name] == [f"{kernel} on the host" for kernel in chosen]
    assert report["environment"]["torch"] == torch.__version__
    assert report["complete"]
    assert f"written: {flags.output}" in capsys.readouterr().out


def read(flags: Flags) -> dict[str, Any]:
    assert flags.output is not None
    return json.loads(flags.output.read_text())


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
        "environment": {"gpu": "a GPU", "cpu": "a CPU"},
        "identity": {"torch": "2", "triton": "3", "liger-kernel": None},
        "dtype": "bfloat16",
        "rounds": 2,
        "cases": {str(number): record for number, record in enumerate(records)}
        | {"host": {**host, "target_us": 40.0, "verdict": "missed"}},
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
