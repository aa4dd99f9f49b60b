"""The training loop, alone: when it saves and leaves, what it refuses to step on, and what it tells of every step."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argonne.checkpoint import checkpoints, faults, load_trainer
from argonne.data import Assignment
from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.errors import ArgonneError
from argonne.training import report, trainer
from argonne.training.run.loss import cross_entropy
from argonne.training.schedule import Schedule
from argonne.training.step import StepResult
from argonne.training.trainer import Trainer
from tests.integration.runs import metrics
from tests.pool import RankPool
from tests.training.settled import SEED, SmallRun, assert_same, held

ALONE = ProcessGroups.single()
FIELDS = {
    "step", "tokens", "loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second", "step_time",
    "data_wait", "mfu", "memory_gib", "data_position", "layout", "batch_hash",
}  # fmt: skip
"""Of a line of ``metrics.jsonl``: what other tools rely on."""


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all the steps."""
    monkeypatch.setattr(report, "plot_loss", lambda *what: False)


def start(small: SmallRun, directory: Path, training: dict[str, Any] | None = None, **run: Any) -> Trainer:
    return small.trainer(small.configured(directory, training or {}, **run), ALONE)


def saved(directory: Path) -> list[int]:
    return [load_trainer(path)["step"] for path in checkpoints(directory)]


def test_it_saves_at_every_interval_and_at_the_end_and_lets_old_checkpoints_go(
    small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(small, tmp_path, keep_checkpoints=2).run() == 0
    assert saved(tmp_path) == [4, 5]
    assert all(faults(path) == [] for path in checkpoints(tmp_path))
    told = capsys.readouterr().out
    assert re.findall(r"^saved .*/step_0*(\d+)(.*)$", told, re.M) == [("2", ""), ("4", ""), ("5", "; 1 older pruned")]
    assert told.count("data: ") == told.count("'Long long time ago, ") == 3
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("stop", "expected"), [(3, [2, 3]), (4, [2, 4]), (9, [2, 4, 5])])
def test_it_leaves_at_the_step_that_it_is_to_stop_at_on_the_schedule_of_the_whole_run(
    small: SmallRun, tmp_path: Path, stop: int, expected: list[int]
) -> None:
    run = start(small, tmp_path, stop_at_step=stop)
    assert run.run() == 0
    assert saved(tmp_path) == expected
    schedule = Schedule(3e-3, 1e-4, 2, 5)
    rates = [line["learning_rate"] for line in metrics(tmp_path)]
    assert rates == [schedule.learning_rate(step) for step in range(1, min(stop, 5) + 1)]
    assert run.state.step == len(rates)


def test_a_line_of_every_step_has_the_fields_of_the_contract(small: SmallRun, tmp_path: Path) -> None:
    run = start(small, tmp_path)
    run.held_out = torch.randint(300, (2, 3, 17), generator=torch.Generator().manual_seed(1))
    run.run()
    lines = metrics(tmp_path)
    for number, line in enumerate(lines, 1):
        assert set(line) == FIELDS
        assert (line["step"], line["tokens"]) == (number, 96 * number)  # 2 x 3 sequences of 16
        assert line["data_position"]["sample"] == 6 * number
        assert line["data_position"]["shard"] == "part-0.parquet"
        assert set(line["data_position"]) == {"epoch", "shard", "row_group", "row", "token", "sample"}
        assert line["layout"] == dataclasses.asdict(Layout())
        assert re.fullmatch(r"[0-9a-f]{32}", line["batch_hash"])
        assert 0 < line["data_wait"] < line["step_time"]
        assert line["tokens_per_second"] == pytest.approx(96 / line["step_time"])
        assert line["mfu"] is None  # nobody knows the peak of a CPU
        assert line["memory_gib"] > 0.01
        assert 5 < line["loss"] < 9
        assert line["grad_norm"] > 0
        assert (line["validation_loss"] is not None) == (number in (2, 4, 5)), "it is measured at every save"
    assert len({line["batch_hash"] for line in lines}) == len({line["loss"] for line in lines}) == 5


@pytest.mark.parametrize(("fsdp", "leaves"), [(False, "contiguous"), (True, "strided")])
def test_samples_are_dealt_out_as_the_groups_and_the_kind_of_replicas_ask(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsdp: bool, leaves: str
) -> None:
    config = small.configured(tmp_path, {})
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, fsdp=fsdp))
    for reproducible, order in ((False, "interleaved"), (True, leaves)):
        monkeypatch.setattr(ProcessGroups, "reproducible", reproducible, raising=False)
        run = small.trainer(config, ALONE)
        run.feed.close()
        assert run.assignment == Assignment(2, 3, 1, order)  # type: ignore[arg-type]


def test_a_step_is_measured_over_all_the_processes_that_made_it(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, layout = start(small, tmp_path), Layout(data=2, tensor=3)
    run.groups = SimpleNamespace(device=torch.device("cpu"), world=SimpleNamespace(size=6), layout=layout)  # type: ignore[assignment]
    monkeypatch.setattr(trainer, "peak_flops", lambda device: 3e9)
    line = run._record(run.feed.next(), StepResult(2.5, 1.25), seconds=0.5, waited=0.1)
    run.feed.close()
    assert (line["loss"], line["grad_norm"], line["step_time"], line["data_wait"]) == (2.5, 1.25, 0.5, 0.1)
    assert line["tokens_per_second"] == pytest.approx(192)
    assert line["mfu"] == pytest.approx(192 * run.state.model.flops_per_token(16) / (6 * 3e9))
    assert line["layout"] == dataclasses.asdict(layout)


def test_the_sample_of_a_save_is_drawn_with_the_seed_of_the_run_and_the_step(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same after an interruption, and another at every save."""
    seeds: list[int] = []
    monkeypatch.setattr(trainer, "sample_text", lambda model, tokenizer, tokens, seed: seeds.append(seed))
    start(small, tmp_path).run()
    assert seeds == [SEED + 2, SEED + 4, SEED + 5]


def told(groups: ProcessGroups, small: SmallRun, directory: Path, training: dict[str, Any]) -> None:
    workload = small.workload if groups.model.rank == 0 else dataclasses.replace(small.workload, tokenizer=None)
    config = small.configured(directory, training, stop_at_step=2)
    workload = dataclasses.replace(workload, loss=cross_entropy(config, groups))
    dataclasses.replace(small, workload=workload).trainer(config, groups).run()


@pytest.mark.parametrize("on", [("z_loss",), ("label_smoothing", "z_loss")])
def test_label_smoothing_and_z_loss_are_told_apart_and_add_up_to_the_loss_in_every_layout(
    ranks: RankPool, small: SmallRun, tmp_path: Path, on: tuple[str, ...]
) -> None:
    training = {"precision": "fp64", "gradient_accumulation_steps": 2, **dict.fromkeys(on, 0.03)}
    told(ALONE, small, tmp_path / "alone", training)
    expected = metrics(tmp_path / "alone")
    names = ["cross_entropy", *on]
    for line in expected:
        assert set(line) == FIELDS | set(names)
        assert sum(line[name] for name in names) == pytest.approx(line["loss"], rel=1e-13)
        assert min(line[name] for name in names if name != "label_smoothing") > 0.1
    layouts = [Layout(tensor=2, sequence_parallel=True), Layout(pipeline=2), Layout(context=2), Layout(data=2)]
    for layout in layouts[: 1 if len(on) == 1 else None]:
        directory = tmp_path / str(layout)
        ranks.run(layout, told, small, directory, training)
        for line, alone in zip(metrics(directory), expected, strict=True):
            for name in ("loss", *names):
                assert line[name] == pytest.approx(alone[name], rel=1e-10), f"{name} of {layout}"


def fully_sharded(groups: ProcessGroups, small: SmallRun, directory: Path) -> None:
    workload = small.workload if groups.model.rank == 0 else dataclasses.replace(small.workload, tokenizer=None)
    config = small.configured(directory, {"precision": "fp32"}, stop_at_step=3)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, fsdp=True))
    dataclasses.replace(small, workload=workload).trainer(config, groups).run()


def test_fsdp_goes_on_after_the_text_of_a_save(ranks: RankPool, small: SmallRun, tmp_path: Path) -> None:
    """On some CPUs the products of generation had kept the memory that FSDP gives back."""
    ranks.run(Layout(data=2), fully_sharded, small, tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    assert saved(tmp_path) == [2, 3]


def spoil(run: Trainer, what: str) -> None:
    """Make the next loss, or only a gradient of the next step, not a number or infinite."""
    last = run.state.parameters[-1].parameter
    if what == "loss":
        last.data.fill_(torch.nan)
    else:
        last.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize(("what", "value"), [("loss", "nan"), ("gradient norm", "(nan|inf)")])
def test_what_is_not_finite_stops_before_the_step_is_taken_and_names_it(
    small: SmallRun, tmp_path: Path, what: str, value: str
) -> None:
    start(small, tmp_path, stop_at_step=2).run()
    run = small.trainer(small.configured(tmp_path, {}), ALONE, checkpoints(tmp_path)[0])
    spoil(run, what)
    before, lanes = held(run.state), run.state.lanes
    expected = (
        f"^the {what} of step 3 is {value}; the step was not taken. Continue from the last checkpoint with a lower"
    )
    with pytest.raises(ArgonneError, match=expected) as refusal:
        run.run()
    run.feed.close()
    assert "\n" not in str(refusal.value)
    assert (run.state.step, run.state.tokens, run.state.next_sample, run.state.lanes) == (2, 192, 12, lanes)
    assert_same(held(run.state), before)
    assert saved(tmp_path) == [2]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


def spoiled_on_one(groups: ProcessGroups, small: SmallRun, directory: Path, what: str) -> str:
    run = small.trainer(small.configured(directory, {}), groups)
    if groups.world.rank == 1:
        spoil(run, what)
    try:
        run.run()
    except ArgonneError as error:
        return str(error)
    finally:
        run.feed.close()
    return "trained"


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_what_is_not_finite_on_one_rank_stops_all_with_the_same_line(
    ranks: RankPool, small: SmallRun, tmp_path: Path, what: str
) -> None:
    one, other = ranks.run(Layout(data=3), spoiled_on_one, small, tmp_path, what)[:2]
    assert one == other
    assert re.match(f"the {what} of step 1 is (nan|inf|-inf); the step was not taken", one)


def test_an_overflow_in_float16_skips_the_update_and_halves_the_scale(small: SmallRun, tmp_path: Path) -> None:
    run = start(small, tmp_path, {"precision": "fp16", "initial_loss_scale": 2.0**26, "total_steps": 12})
    before, scales = held(run.state), []
    step = run.reports.step

    def watch(record: dict[str, Any]) -> None:
        scales.append(run.state.loss_scale.scale)
        if record["grad_norm"] is None:
            assert_same(held(run.state), before)
        step(record)

    run.reports.step = watch  # type: ignore[method-assign]
    assert run.run() == 0
    norms = [line["grad_norm"] for line in metrics(tmp_path)]
    skipped = norms.index(next(norm for norm in norms if norm is not None))
    assert 1 < skipped < 12, "the first steps overflow, and some do not"
    assert norms == [None] * skipped + [norm for norm in norms if norm is not None]
    assert scales == [2.0 ** (26 - min(n, skipped)) for n in range(1, 13)]
    told = load_trainer(checkpoints(tmp_path)[-1])
    assert (told["step"], told["optimizer_step"]) == (12, 12 - skipped), "a skipped update counts in the moments"
    assert told["loss_scale"] == {"scale": scales[-1], "steps_since_change": 12 - skipped}
    assert [line["tokens"] for line in metrics(tmp_path)] == [96 * n for n in range(1, 13)]


def test_a_scale_that_can_go_no_lower_stops_the_run(small: SmallRun, tmp_path: Path) -> None:
    run = start(small, tmp_path, {"precision": "fp16", "initial_loss_scale": 1.0})
    spoil(run, "gradient norm")
    with pytest.raises(ArgonneError, match="the gradient norm of step 1 is (nan|inf); the step was not taken"):
        run.run()
    run.feed.close()
