"""The kernels' contestants on a CPU: they compute the same, in every direction, and a rival that fails is said."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernel_contestants
from benchmarks.kernel_contestants import Contestant, inputs_of
from benchmarks.kernel_targets import KERNELS
from benchmarks.kernel_timing import WallTimer, calls_of, measure
from tests.benchmarks.kernel_cases import CPU, TINY, timed


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
