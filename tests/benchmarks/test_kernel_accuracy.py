"""Errors against float64: their definitions, the contract that the references hold, and one that is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernel_accuracy, kernels
from benchmarks.kernel_accuracy import changed, loss_error, pair_error, relative_l2, relative_max, ulp_distance
from benchmarks.kernels import Flags
from tests.benchmarks.kernel_cases import BF16, command


def test_a_unit_in_the_last_place_is_that_of_the_exact_value() -> None:
    exact = torch.tensor([1.0, 1.5, 1.99, 2.0, -3.0, 0.0], dtype=torch.float64)
    assert ulp_distance(exact.to(BF16), exact) < 0.5
    unit = 2.0**-7  # of bfloat16 from 1 to 2
    for value, size in ((1.0, unit), (1.984375, unit), (2.0, 2 * unit), (-3.0, 2 * unit), (0.25, unit / 4)):
        one_off = torch.tensor([value + size], dtype=torch.float64).to(BF16)
        assert ulp_distance(one_off, torch.tensor([value], dtype=torch.float64)) == 1.0
    between = torch.tensor([1 + unit / 4], dtype=torch.float64)
    assert ulp_distance(torch.ones(1, dtype=BF16), between) == 0.25
    subnormal = torch.tensor([2.0**-133], dtype=torch.float64)  # bfloat16's smallest
    assert ulp_distance(torch.zeros(1, dtype=BF16), subnormal) == 1.0
    assert ulp_distance(torch.tensor([torch.nan], dtype=BF16), between) == torch.inf


def test_truncating_is_off_by_nearly_one_unit() -> None:
    wide = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    truncated = (wide.view(torch.int32) & -65536).view(torch.float32).to(BF16)
    assert 0.9 < ulp_distance(truncated, wide.double()) < 1
    assert ulp_distance(wide.to(BF16), wide.double()) <= 0.5


def test_errors_follow_their_definitions() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_l2(torch.tensor([3.0, 4.5]), exact) == 0.1
    assert relative_max(torch.tensor([3.5, 4.0]), exact) == 0.125
    assert pair_error(torch.tensor([[3.0, 4.5]]), exact[None]) == 0.1
    assert loss_error(torch.tensor([0.6, 8.0]), torch.tensor([0.5, 10.0], dtype=torch.float64)) == pytest.approx(0.2)
    assert changed(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-0.0, 1.0, 2.5])) == 2


def test_the_references_hold_the_contract_and_every_line_is_shown(tmp_path: Path) -> None:
    output = tmp_path / "accuracy.json"
    done = command("-m", "benchmarks.kernels", "--accuracy", "--output", str(output), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BROKEN" not in done.stdout
    contract = json.loads(output.read_text())["contract"]
    assert all(line["held"] for line in contract)
    assert len(contract) == 43
    for name, most in (
        ("RMSNorm: y, bf16", "0.51"),
        ("RMSNorm: dx, bf16", "0.0017"),
        ("RMSNorm: dW, fp32 of bf16", "1e-06"),
        ("RMSNorm: dW, fp32 of bf16, run again", "0"),
        ("add + RMSNorm: dx, bf16", "0.0017"),
        ("SwiGLU: dgate, bf16", "0.51"),
        ("SwiGLU, packed: d(gate, up), bf16", "0.51"),
        ("RoPE: out, bf16", "0.004"),
        ("RoPE, packed: dqkv, bf16", "0.004"),
        ("cross-entropy: loss, bf16", "2e-06"),
        ("cross-entropy: loss shifted by -1e3, bf16", "2e-06"),
        ("RMSNorm: y, fp32", "3e-07"),
        ("cross-entropy: loss, fp32", "3e-07"),
    ):
        (line,) = [line for line in done.stdout.splitlines() if line.split("  ")[0] == name]
        assert line.split()[-3:] == ["<=", most, "yes"], line


def test_a_kernel_that_computes_in_bfloat16_breaks_the_contract(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def careless(gate: Tensor, up: Tensor | None = None, *, backend: str) -> Tensor:
        first, second = gate.chunk(2, -1) if up is None else (gate, up)
        return F.silu(first) * second

    monkeypatch.setattr(kernel_accuracy, "swiglu", careless)
    monkeypatch.setattr(kernel_accuracy, "VOCABULARY", 1000)
    with pytest.raises(SystemExit) as ended:
        kernels.main(Flags(accuracy=True, device="cpu"))
    assert ended.value.code == "argonne: 5 lines of the contract are broken"  # a text is status 1
    broken = [line for line in capsys.readouterr().out.splitlines() if line.endswith("BROKEN")]
    assert [line.split("  ")[0] for line in broken] == [
        "SwiGLU: out, bf16",
        "SwiGLU: dgate, bf16",
        "SwiGLU: dup, bf16",
        "SwiGLU, packed: out, bf16",
        "SwiGLU, packed: d(gate, up), bf16",
    ]


def test_the_interpreter_is_made_to_round_to_nearest_even() -> None:
    pytest.importorskip("triton")
    code = """
import numpy as np, torch, triton.language as tl
from triton.runtime import interpreter
from benchmarks.interpreter import mend
torch.manual_seed(0)
values = torch.cat((torch.randn(999), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, torch.inf, 1e-40, 0.0])))
mend(); mend()
found = interpreter._convert_float(values.numpy().reshape(3, -1), tl.float32, tl.bfloat16, None)
assert found.shape == (3, 335) and found.dtype == np.uint16
assert (found.reshape(-1).view(np.int16) == values.to(torch.bfloat16).view(torch.int16).numpy()).all()
half = interpreter._convert_float(np.float32([1.5]), tl.float32, tl.float16, None)
assert half.view(np.float16) == [1.5]
"""
    done = command("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
