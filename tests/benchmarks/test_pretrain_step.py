"""benchmarks/pretrain_step.py: what it refuses, what it writes, and where its figures come from."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from argonne.models import ArgonneConfig
from argonne.models.build import PRESETS
from argonne.parallel import ArgonneError
from benchmarks import pretrain_step
from benchmarks.pretrain_step import Flags, check, figures, run
from benchmarks.step_contestants import (
    PHASES,
    Contestant,
    Record,
    Trainer,
    contestants,
    require_agreement,
)
from benchmarks.step_profile import attention_of, profile_step
from tests.models.compiled import as_graphs

CPU = torch.device("cpu")
TINY = ArgonneConfig(16, 4, 2, 1, 40, max_position_embeddings=32)
SMALL = Flags(device="cpu", preset="tiny", sequence=16, micro_batch=2, rounds=3, steps=1, warmup=0)
EAGER, CHECKPOINTING = contestants(CPU, compiled=False)
PEAK = 1e9  # FLOP/s


@pytest.fixture(autouse=True, scope="module")
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        yield


def measured(flags: Flags, folder: Path) -> dict[str, Any]:
    run(replace(flags, output=folder / "out.json"))
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON of a run in float32, and what it printed; the peak is known, but it is bfloat16's."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(pretrain_step, "peak_flops", lambda device: PEAK)
        found = measured(SMALL, tmp_path_factory.mktemp("run"))
    return found, said.getvalue()


def test_the_json_has_every_figure_of_every_contestant(whole_run: tuple[dict[str, Any], str]) -> None:
    found, said = whole_run
    assert found["benchmark"] == "pretrain_step"
    assert {"torch", "cpu", "commit", "threads"} <= set(found["environment"])
    assert found["parameters"] == TINY.parameter_count
    assert list(found["contestants"]) == ["torch, eager", "torch, eager, recompute full"]
    assert found["contestants"]["torch, eager"]["ratio"] == 1
    for name, own in found["contestants"].items():
        assert name in said
        assert own["failure"] is None
        assert len(own["rounds"]) == SMALL.rounds
        assert own["tokens_per_second"] == pytest.approx(32 / own["step_seconds"])
        assert own["first_loss"] == pytest.approx(found["contestants"]["torch, eager"]["first_loss"], rel=1e-5)
        assert own["peak_memory_bytes"] > 12 * TINY.parameter_count  # weights and two moments in float32
        kernels = own["profile"]["most_expensive_kernels"]
        assert len(kernels) == 10
        assert [k["seconds"] for k in kernels] == sorted((k["seconds"] for k in kernels), reverse=True)
        assert 0 < sum(k["share"] for k in kernels) <= 1
        assert all(k["name"][:90] in said for k in kernels)


def test_forward_backward_and_optimizer_lie_within_the_step(whole_run: tuple[dict[str, Any], str]) -> None:
    for own in whole_run[0]["contestants"].values():
        for seconds in (*own["rounds"], {name: own[f"{name}_seconds"] for name in ("step", *PHASES)}):
            assert all(seconds[phase] > 0 for phase in PHASES)
            assert sum(seconds[phase] for phase in PHASES) <= seconds["step"]


def test_mfu_is_the_flops_of_the_tokens_over_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain_step, "peak_flops", lambda device: PEAK)
    for own in measured(replace(SMALL, precision="bf16", rounds=1), tmp_path)["contestants"].values():
        assert own["mfu"] == pytest.approx(own["tokens_per_second"] * TINY.flops_per_token(16) / PEAK)
        assert own["mfu_uncut_attention"] > own["mfu"]
    turn = {"step": 0.5, "forward": 0.1, "backward": 0.2, "optimizer": 0.1}
    record = Record(turns=[turn])
    # 32 tokens in half a second; 6 N, and 6 x 4 layers x 2 heads x 8 x 16 positions of attention
    expected = 64 * (6 * TINY.parameter_count + 6 * 4 * 2 * 8 * 16) / PEAK
    found = figures(EAGER, record, record, SMALL, PEAK)
    assert found["mfu"] == pytest.approx(expected)
    uncut = 64 * 6 * 4 * 2 * 8 * 16 / PEAK
    assert found["mfu_uncut_attention"] == pytest.approx(expected + uncut)
    assert "not known" not in capsys.readouterr().out


def test_mfu_is_not_known_where_the_peak_is_not(whole_run: tuple[dict[str, Any], str]) -> None:
    found, said = whole_run
    assert found["peak_flops"] is None
    assert all(own["mfu"] is None for own in found["contestants"].values())
    assert said.count("not known") == 4


@pytest.mark.parametrize(("backend", "name"), [(SDPBackend.MATH, "math"), (SDPBackend.FLASH_ATTENTION, "flash")])
def test_the_attention_named_is_the_one_that_ran(
    backend: SDPBackend, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sdpa_kernel(backend):
        found = measured(replace(SMALL, rounds=1), tmp_path)
    for own in found["contestants"].values():
        assert own["profile"]["attention_backend"] == name
        assert any(f"_{name}" in kernel for kernel in own["profile"]["attention_kernels"])
    assert f"attention that ran: {name} (all)" in capsys.readouterr().out


def test_attention_is_not_named_from_operators_that_did_not_run() -> None:
    assert attention_of(["aten::mm", "aten::scaled_dot_product_attention"])[0] == "none of PyTorch's operators"
    assert attention_of(["aten::_scaled_dot_product_cudnn_attention_backward"])[0] == "cuDNN"


def test_memory_on_a_cpu_is_the_most_that_a_step_holds_at_once() -> None:
    def step() -> None:
        for _ in range(3):  # each mebibyte is freed before the next two are taken
            x = torch.empty(1 << 20, dtype=torch.uint8)
            y = x.clone()
            del x, y

    assert profile_step(step, CPU).allocated == 2 << 20


def test_checkpointing_holds_less(tmp_path: Path) -> None:
    eager, checkpointing = measured(replace(SMALL, sequence=128, rounds=1), tmp_path)["contestants"].values()
    assert checkpointing["peak_memory_bytes"] < eager["peak_memory_bytes"]


def test_first_steps_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    become = Trainer.become

    def spoil(self: Trainer, contestant: Contestant) -> None:
        become(self, contestant)
        if contestant.recompute == "full":
            self.model.model.norm.weight.data.mul_(2)

    monkeypatch.setattr(Trainer, "become", spoil)
    with pytest.raises(ArgonneError, match="the first loss of 'torch, eager, recompute full' is"):
        run(replace(SMALL, output=tmp_path / "out.json"))
    assert not json.loads((tmp_path / "out.json").read_text())["complete"]


@pytest.mark.parametrize(
    ("found", "words"),
    [((1.01, 1.0), "first loss"), ((float("nan"), 1.0), "first loss"), ((1.0, 1.1), "first gradient norm")],
)
def test_losses_and_gradient_norms_must_agree(found: tuple[float, float], words: str) -> None:
    require_agreement({"a": (1.0, 1.0), "b": (1.001, 1.01)}, "bf16")
    with pytest.raises(ArgonneError, match=words):
        require_agreement({"a": (1.0, 1.0), "b": found}, "bf16")


def test_weights_stay_so_that_every_step_is_the_same() -> None:
    trainer = Trainer(TINY, (2, 16), "fp32", CPU)
    first = trainer.first()
    trainer.turn(steps=2, warmup=1)
    assert trainer.first() == first


def test_a_contestant_without_memory_has_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = Trainer.loss

    def too_large(self: Trainer) -> torch.Tensor:
        if self.contestant.recompute == "none":
            raise torch.OutOfMemoryError
        return loss(self)

    monkeypatch.setattr(Trainer, "loss", too_large)
    found = measured(replace(SMALL, rounds=1), tmp_path)
    failed, other = found["contestants"].values()
    assert (failed["failure"], failed["step_seconds"], failed["profile"]) == ("out of memory", None, None)
    assert found["ratio_to"] == "torch, eager, recompute full"
    assert other["ratio"] == 1
    assert "out of memory" in capsys.readouterr().out


def test_a_run_that_was_cut_off_goes_on_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = []
    take = Trainer.turn

    def counted(self: Trainer, steps: int, warmup: int) -> Any:
        if len(turns) == 3:
            raise KeyboardInterrupt
        turns.append(self.contestant.name)
        return take(self, steps, warmup)

    monkeypatch.setattr(Trainer, "turn", counted)
    flags = replace(SMALL, rounds=2, resume=True)
    with pytest.raises(KeyboardInterrupt):
        measured(flags, tmp_path)
    turns.clear()
    found = measured(flags, tmp_path)
    assert turns == ["torch, eager, recompute full"]
    assert all(len(own["rounds"]) == 2 for own in found["contestants"].values())
    capsys.readouterr()
    assert measured(flags, tmp_path) == found
    assert turns == ["torch, eager, recompute full"]
    assert "x torch, eager" in capsys.readouterr().out


def test_recomputation_and_attention_are_a_contest_of_their_own(tmp_path: Path) -> None:
    found = measured(replace(SMALL, rounds=1, contest="memory"), tmp_path)["contestants"]
    assert list(found)[:2] == ["torch, eager", "torch, eager, recompute full"]
    ran = {name: own["profile"]["attention_backend"] for name, own in found.items() if own["failure"] is None}
    assert ran["torch, eager, math attention"] == "math"
    assert ran["torch, eager, flash attention"] == "flash"
    assert found["torch, eager, cuDNN attention"]["failure"] == "not here for this shape"
    assert "torch, eager, recompute selective" in found


def test_what_the_compiler_cannot_do_is_recorded_and_what_eager_cannot_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise RuntimeError("no such graph\nand more")

    monkeypatch.setattr(Trainer, "become", lambda self, contestant: None)
    trainer, record = Trainer(TINY, (2, 16), "fp32", CPU), Record()
    assert trainer.attempt(replace(EAGER, compiled=True), fail, record) is None
    assert record.failure == "RuntimeError: no such graph"
    with pytest.raises(RuntimeError, match="no such graph"):
        trainer.attempt(EAGER, fail, record)


def test_what_is_compiled_is_compiled_once_and_as_a_run_does(tmp_path: Path) -> None:
    with as_graphs():
        found = measured(replace(SMALL, rounds=1, compile="on"), tmp_path)
    assert found["compiled"]["graph_breaks"] == 0
    own = found["contestants"]
    assert list(own) == [c.name for c in contestants(CPU, compiled=True)]
    assert all(one["failure"] is None for one in own.values())
    assert own["torch, compiled"]["first_loss"] == pytest.approx(own["torch, eager"]["first_loss"], rel=1e-6)


def test_on_a_gpu_every_choice_takes_part() -> None:
    names = [contestant.name for contestant in contestants(torch.device("cuda"), compiled=True)]
    assert names == [
        f"{kernels}, {mode}{recompute}"
        for kernels in ("torch", "triton")
        for mode in ("eager", "compiled")
        for recompute in ("", ", recompute full")
    ]


def test_kernels_and_checkpointing_are_switched_on_the_same_weights() -> None:
    trainer = Trainer(TINY, (2, 16), "fp32", CPU)
    trainer.become(Contestant("triton", recompute="full"))
    held = [getattr(m, name) for m in trainer.model.modules() for name in ("backend", "kernels") if hasattr(m, name)]
    assert len(held) == 4 * 4 + 1  # the norms, attention and feed-forward of each block, the last norm
    assert trainer.cross_entropy.kernels == "triton"
    assert set(held) == {"triton"}
    assert trainer.contestant.recompute == "full"
    trainer.become(EAGER)
    assert trainer.contestant == EAGER


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"micro_batch": 0}, "micro_batch=0 is not legal; legal: 1 or more"),
        ({"sequence": 0}, "sequence=0 is not legal; legal: 1 or more"),
        ({"steps": 0}, "steps=0 is not legal; legal: 1 or more"),
        ({"rounds": 0}, "rounds=0 is not legal; legal: 1 or more"),
        ({"warmup": -1}, "warmup=-1 is not legal; legal: 0 or more"),
        ({"preset": "argonne-3"}, "preset='argonne-3' is not known; legal: demo, "),
        ({"preset": "argonne-2.0-8b"}, "needs 252.9 GiB for weights, gradients and moments, and 1.0 GiB are free"),
    ],
)
def test_what_cannot_be_measured_is_refused(changed: dict[str, Any], words: str) -> None:
    flags = replace(SMALL, **changed).settled(CPU)
    with pytest.raises(ArgonneError, match=words):
        check(flags, available=1 << 30)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_refusals_are_one_line_with_exit_status_2() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "pretrain_step.py"
    done = subprocess.run([sys.executable, str(script), "--device=cuda"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "this machine has no CUDA device" in done.stderr
