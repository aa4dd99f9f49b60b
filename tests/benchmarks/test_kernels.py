"""The benchmark of the kernels: its definitions, its refusals, and its contestants on a CPU with another timer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from argonne.parallel import ArgonneError
from benchmarks import kernel_accuracy, kernel_contestants, kernels
from benchmarks.kernel_accuracy import changed, loss_error, pair_error, relative_l2, relative_max, ulp_distance
from benchmarks.kernel_contestants import Contestant, contestants, inputs_of
from benchmarks.kernel_report import plot_ratios, show
from benchmarks.kernel_targets import (
    HOST_MICROSECONDS,
    KERNELS,
    ROPE_CLONE,
    TARGETS,
    Case,
    Target,
    cases,
    minimum_bytes,
    products_flops,
    target,
    verdicts,
)
from benchmarks.kernel_timing import (
    Call,
    GraphTimer,
    Sample,
    calls_in_a_replay,
    calls_of,
    clone_calls,
    cold_copies,
    host_microseconds,
    measure,
)
from benchmarks.kernels import Flags

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


def test_minimum_bytes_are_those_of_the_design() -> None:
    tokens, element = 8192, 2
    norm = Case("rms_norm", BF16, tokens, hidden=4080)
    assert minimum_bytes(norm, "forward") == 2 * tokens * 4080 * element
    assert minimum_bytes(norm, "backward") == 3 * tokens * 4080 * element
    both = replace(norm, kernel="add_rms_norm")
    assert minimum_bytes(both, "forward") == minimum_bytes(both, "backward") == 4 * tokens * 4080 * element
    assert minimum_bytes(both, "both") == 8 * tokens * 4080 * element
    rope = Case("rope", BF16, tokens, heads=24, key_value_heads=8, head_dim=170)
    assert minimum_bytes(rope, "forward") == minimum_bytes(rope, "backward") == 2 * tokens * (24 + 8) * 170 * element
    packed = replace(rope, kernel="rope_packed")
    assert minimum_bytes(packed, "forward") == minimum_bytes(rope, "forward")
    assert minimum_bytes(packed, "backward") == 2 * tokens * (24 + 2 * 8) * 170 * element
    gated = Case("swiglu", torch.float32, tokens, feed_forward=11_008)
    assert minimum_bytes(gated, "forward") == 3 * tokens * 11_008 * 4
    assert minimum_bytes(gated, "backward") == 5 * tokens * 11_008 * 4
    loss = Case("cross_entropy", BF16, tokens, vocabulary=151_665)
    assert minimum_bytes(loss, "both") == 3 * tokens * 151_665 * element
    fused = Case("linear_cross_entropy", BF16, tokens, hidden=4080, vocabulary=151_665)
    assert (minimum_bytes(fused, "both"), products_flops(fused)) == (0, 6 * tokens * 4080 * 151_665)


def test_targets_are_those_of_the_design() -> None:
    assert {
        ("rms_norm", "forward"): Target(0.97, 1.08, 1.0),
        ("rms_norm", "backward"): Target(0.90, 1.4, 1.2),
        ("add_rms_norm", "both"): Target(0.92, 1.3, 1.1),
        ("rope", "forward"): Target(None, None, 1.0),
        ("rope", "backward"): Target(None, None, 1.0),
        ("rope_packed", "both"): Target(None, 1.8, None),
        ("swiglu", "forward"): Target(0.96, 1.0, 1.0),
        ("swiglu", "backward"): Target(0.95, 1.0, 1.0),
        ("cross_entropy", "both"): Target(0.85, 3.0, 1.3),
        ("linear_cross_entropy", "both"): Target(None, 3.0, None, 1.25, 1.0),
    } == TARGETS
    assert ROPE_CLONE == {128: 0.93, 170: 0.85}
    assert HOST_MICROSECONDS == 40
    assert set(TARGETS) <= {(kernel, direction) for kernel, timed in KERNELS.items() for direction in timed}


def test_targets_are_of_bfloat16_many_tokens_and_widths_in_reach() -> None:
    rope = Case("rope", BF16, 8192, heads=24, key_value_heads=8, head_dim=170)
    assert target(rope, "forward") == Target(clone=0.85, compiled=1.0)
    assert target(replace(rope, head_dim=64), "forward") == Target(compiled=1.0)
    assert target(replace(rope, dtype=torch.float32), "forward") == target(replace(rope, tokens=4096), "forward")
    assert target(replace(rope, tokens=4096), "forward") == Target()
    assert target(Case("rms_norm", BF16, 8192, hidden=16_384), "backward") == Target()


def test_verdicts_compare_rates_and_say_what_was_not_measured() -> None:
    found = verdicts(Case("rms_norm", BF16, 8192, hidden=4080), "forward", {"argonne": 1.0, "torch.clone": 0.96})
    assert [(v["name"], v["target"], v["verdict"]) for v in found] == [
        ("rate / torch.clone", 0.97, "missed"),
        ("rate / liger", 1.08, "not measured"),
        ("rate / torch.compile", 1.0, "not measured"),
    ]
    fused = Case("linear_cross_entropy", BF16, 8192, hidden=4080, vocabulary=151_665)
    seconds = {"argonne": 1.25, "bare products": 1.0, "liger": 3.0, "F.linear_cross_entropy": 1.3}
    outcome = {v["name"]: v["verdict"] for v in verdicts(fused, "both", seconds)}
    assert outcome == {"rate / liger": "missed", "rate / F.linear_cross_entropy": "met", "time / bare products": "met"}


def test_cases_are_the_presets_and_powers_of_two() -> None:
    widths = {case.hidden for case in cases("rms_norm", BF16, 8192)}
    assert widths == {4080, 3072, 2048, 5120, 1024, 4096, 8192}
    assert {case.head_dim for case in cases("rope", BF16, 8192)} == {170, 128, 64}
    assert all(len(set(cases(kernel, BF16, 8192))) == len(cases(kernel, BF16, 8192)) for kernel in KERNELS)


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


def test_inputs_turn_through_several_sizes_of_the_cache() -> None:
    cache = 50 * 2**20
    for size in (2**16, 2**24, 2**26, 2**29):
        copies = cold_copies(size, cache)
        assert copies >= 2
        assert copies * size >= 4 * cache
    assert cold_copies(40 * cache, cache) == cold_copies(0, cache) == 1


def test_a_replay_is_whole_turns_and_long_enough() -> None:
    assert calls_in_a_replay(size=134_217_728, flops=0, copies=7) == 63  # 33.6 us each at 4 TB/s
    assert calls_in_a_replay(size=0, flops=10**15, copies=1) == 1
    assert calls_in_a_replay(size=4_096_000, flops=0, copies=50) == 2000


def test_a_clone_moves_as_many_bytes() -> None:
    (call,) = clone_calls(1000, 1, CPU)
    assert 2 * call().nbytes == 1000


class WallTimer:
    """The timer of a machine without a GPU; it notes what it was given."""

    def __init__(self) -> None:
        self.prepared: list[tuple[int, int, bool]] = []

    def within(self) -> nullcontext[None]:
        return nullcontext()

    def copies(self, size: int) -> int:
        return 2 if size else 1

    def prepare(self, calls: Sequence[Call], count: int, capturable: bool) -> Sample:
        self.prepared.append((len(calls), count, capturable))
        for call in calls:
            call()

        def sample() -> float:
            began = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - began) / len(calls)

        return sample


class FakeCuda:
    """``torch.cuda``, as far as the timer uses it, of a GPU on which every replay takes 6 ms; it notes what happens."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.stream = self.graph = lambda *arguments, stream=None: nullcontext()
        self.Stream = lambda device: "a stream"

    def synchronize(self) -> None:
        self.log.append("wait")

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(L2_cache_size=50 * 2**20)

    def CUDAGraph(self) -> Any:
        self.log.append("graph")
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        note = self.log.append
        return SimpleNamespace(
            record=lambda: note("event"), synchronize=lambda: note("end"), elapsed_time=lambda other: 6.0
        )


@pytest.mark.parametrize("capturable", [True, False])
def test_the_timer_warms_up_captures_and_times_a_replay(monkeypatch: pytest.MonkeyPatch, capturable: bool) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    timer = GraphTimer(torch.device("cuda"))
    assert timer.copies(2**24) == 13
    calls = [lambda n=n: cuda.log.append(f"call {n}") for n in range(2)]
    sample = timer.prepare(calls, 4, capturable)
    turns = ["call 0", "call 1", "call 0", "call 1"]
    warm = ["wait", *turns[:3], "wait"]
    once = ["event", *(["replay"] if capturable else turns), "event", "end"]
    assert cuda.log == [*warm, *(["graph", *turns] if capturable else []), *once]
    cuda.log.clear()
    assert sample() == pytest.approx(6e-3 / 4)
    assert cuda.log == once


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


def timed(case: Case) -> dict[str, Contestant | str]:
    """Without the compiler, which takes its time on a CPU."""
    return {name: c for name, c in contestants(case, backend="torch").items() if name != "torch.compile"}


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger-Kernel's functions in plain torch, in place of the package: their names, arguments and results."""
    module: Any = ModuleType("liger_kernel.transformers.functional")

    def rms(X: Tensor, W: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True):
        assert not in_place
        return F.rms_norm(X, W.shape, W, eps)

    def add(X: Tensor, R: Tensor, W: Tensor, eps: float, in_place: bool = True) -> tuple[Tensor, Tensor]:
        return rms(X + R, W, eps, in_place=in_place), X + R

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        def turn(x: Tensor) -> Tensor:  # [batch, heads, sequence, head_dim]
            first, second = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

        return turn(q), turn(k), cos, sin

    module.liger_rms_norm, module.liger_fused_add_rms_norm, module.liger_rope = rms, add, rope
    module.liger_swiglu = lambda a, b: F.silu(a) * b
    module.liger_cross_entropy = lambda input, target, reduction: F.cross_entropy(input, target, reduction=reduction)
    module.liger_fused_linear_cross_entropy = lambda input, weight, target, reduction: F.cross_entropy(
        input @ weight.t(), target, reduction=reduction
    )
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["liger_kernel.transformers"].functional = module  # type: ignore[attr-defined]


def flat(made: Any) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in (made if isinstance(made, tuple) else (made,))])


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("kernel", KERNELS)
def test_contestants_compute_the_same(kernel: str) -> None:
    case = TINY[kernel]
    inputs = inputs_of(case, CPU)
    own, plain, formula = kernel_contestants._OURS[kernel](case, "torch")
    others: dict[str, Any] = {"torch": plain, "formula": formula, **timed(case)}
    (call,) = calls_of(own, "forward", [inputs])
    expected = call()
    for name, other in others.items():
        if name == "bare products" or isinstance(other, str):  # why it is not there
            continue
        (call,) = calls_of(other, "forward", [inputs])
        made = call()
        if name == "liger" and kernel == "rope":  # of queries and keys apart, in another order of the dimensions
            made = torch.cat([part.transpose(1, 2) for part in made], 2)
        if name == "liger" and kernel == "rope_packed":
            made = (made[0].transpose(1, 2), made[1].transpose(1, 2), made[2])
        if name == "liger" and kernel == "cross_entropy":
            torch.testing.assert_close(flat(made), flat(expected).sum()[None])
            continue
        torch.testing.assert_close(flat(made), flat(expected), msg=lambda told, name=name: f"{name}: {told}")


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_direction_is_timed_and_inputs_stay_as_they_are(kernel: str) -> None:
    case = TINY[kernel]
    for direction in KERNELS[kernel]:
        timer = WallTimer()
        record = measure(case, direction, timed(case), CPU, timer, rounds=2)
        found = record["contestants"]
        assert found["argonne"]["median_us"] > 0
        assert (found["argonne"]["of_clone"] is None) == (record["bytes"] == 0) == ("torch.clone" not in found)
        copies, count, _ = timer.prepared[0]
        assert copies == record["copies"]
        assert count % copies == 0
        failed = [told for told in found.values() if isinstance(told, str) and told.startswith("failed")]
        assert not failed
        if kernel == "cross_entropy":
            assert (found["liger"] == f"has no {direction} alone") == (direction != "both")
    if kernel == "linear_cross_entropy":
        assert {"bare products", "F.linear_cross_entropy", "liger"} <= set(found)


def test_what_writes_to_its_inputs_is_given_copies() -> None:
    case = TINY["swiglu"]
    inputs = inputs_of(case, CPU)
    before = inputs["gate"].clone()

    def destroys(gate: Tensor, up: Tensor) -> Tensor:
        with torch.no_grad():
            gate.fill_(7)
        return gate * up

    (call,) = calls_of(Contestant(destroys, ("gate", "up"), ("gate", "up"), writes=True), "forward", [inputs])
    call()
    assert torch.equal(inputs["gate"], before)


def test_a_rival_that_fails_is_said_and_argonne_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gate: Tensor, up: Tensor) -> Tensor:
        raise RuntimeError("out of registers\nand more")

    names = ("gate", "up")
    entrants = timed(TINY["swiglu"]) | {"torch": Contestant(fails, names, names)}
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    entrants["liger"] = kernel_contestants._liger(TINY["swiglu"])
    record = measure(TINY["swiglu"], "forward", entrants, CPU, WallTimer(), rounds=1)
    assert record["contestants"]["torch"] == "failed: RuntimeError: out of registers"
    assert record["contestants"]["liger"] == "not installed"
    with pytest.raises(RuntimeError, match="out of registers"):
        measure(TINY["swiglu"], "forward", {"argonne": entrants["torch"]}, CPU, WallTimer(), rounds=1)


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
