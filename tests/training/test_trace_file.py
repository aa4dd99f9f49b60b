"""Which steps ``--trace`` means, what a run writes of them, and what it drops where it goes on from before."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from argonne.checkpoint import checkpoints
from argonne.parallel import ArgonneError, ProcessGroups
from argonne.training import report
from argonne.training.config import RunConfig, RunFlags
from argonne.training.report import Reports
from argonne.training.run.continuation import continue_at
from argonne.training.step import NotFinite
from argonne.training.trace_file import (
    TracedSteps,
    TraceLine,
    read_trace,
    trace_path,
    traced_steps,
    write_trace,
)
from tests.integration.runs import history
from tests.training.settled import SmallRun

ALONE = ProcessGroups.single()
LINES = [TraceLine("forward", "a", (1, (1 << 64) - 1)), TraceLine("weight", "a.weight", (0,))]


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all the steps."""
    monkeypatch.setattr(report, "plot_loss", lambda *what: False)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("7", {7}),
        ("1-4", {1, 2, 3, 4}),
        ("1-25:10", {1, 11, 21}),
        ("5-5", {5}),
        ("2,5-6, 30-32:2", {2, 5, 6, 30, 32}),
    ],
)
def test_steps_are_said_in_words(words: str, expected: set[int]) -> None:
    steps = TracedSteps.of(words)
    assert {step for step in range(100) if step in steps} == expected


@pytest.mark.parametrize(
    "words", ["", "0", "-3", "4-2", "1-9:0", "1:3", "1-", "x", "1,,2", "1.5", "0-3", "9" * 19, "\u0661"]
)
def test_what_says_no_steps_is_refused_before_a_run(words: str) -> None:
    with pytest.raises(ArgonneError) as refusal:
        RunConfig(run=RunFlags(trace=words)).check()
    assert str(refusal.value) == (
        f"trace={words!r} is not legal; legal: a step (7), steps (1-20), every tenth of them (1-100:10), or several of "
        "these with commas between"
    )


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    for step in (123_456_789, 7):
        write_trace(tmp_path, step, 2, LINES)
    assert trace_path(tmp_path, 7).name == "step_00000007.jsonl"
    assert read_trace(trace_path(tmp_path, 7)) == (2, LINES)
    assert traced_steps(tmp_path) == [7, 123_456_789]


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"leaves": 2}\n{"pass": "sideways", "name": "a", "hashes": []}', "\xff"]
)
def test_what_is_no_trace_is_refused_by_its_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "step_00000007.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ArgonneError, match="is no trace of a step: ") as refusal:
        read_trace(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_run_traces_the_steps_that_it_is_told_to_and_is_the_same_run(small: SmallRun, tmp_path: Path) -> None:
    small.trainer(small.configured(tmp_path / "plain", {}), ALONE).run()
    run = small.trainer(small.configured(tmp_path / "traced", {}, trace="2-3,5"), ALONE)
    run.run()
    assert history(tmp_path / "plain") == history(tmp_path / "traced")
    assert traced_steps(tmp_path / "traced") == [2, 3, 5]
    assert not (tmp_path / "plain" / "trace").exists()
    assert isinstance(run.state.model, torch.nn.Module)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.state.model.modules())
    leaves, lines = read_trace(trace_path(tmp_path / "traced", 3))
    assert leaves == 3
    assert all(len(line.hashes) == (3 if line.kind in ("forward", "backward") else 1) for line in lines)

    # From the checkpoint of step 4 on: what was traced past it is dropped, and made again.
    before = trace_path(tmp_path / "traced", 5).read_bytes()
    (tmp_path / "traced" / "trace" / "step_00000009.jsonl.tmp").write_text("cut short")
    continue_at(tmp_path / "traced", 4, Reports(tmp_path / "traced"))
    assert sorted(path.name for path in (tmp_path / "traced" / "trace").iterdir()) == [
        "step_00000002.jsonl",
        "step_00000003.jsonl",
    ]
    checkpoint = next(path for path in checkpoints(tmp_path / "traced") if path.name == "step_00000004")
    small.trainer(small.configured(tmp_path / "traced", {}, trace="5"), ALONE, checkpoint).run()
    assert trace_path(tmp_path / "traced", 5).read_bytes() == before


def test_a_step_that_is_not_taken_is_traced_as_far_as_it_went(small: SmallRun, tmp_path: Path) -> None:
    run = small.trainer(small.configured(tmp_path, {}, trace="1"), ALONE)
    run.state.parameters[-1].parameter.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NotFinite):
        run.run()
    run.feed.close()
    _, lines = read_trace(trace_path(tmp_path, 1))
    assert {line.kind for line in lines} == {"forward", "backward", "gradient"}


def test_a_trace_that_cannot_be_written_ends_no_run(
    small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trace").write_text("in the way")
    run = small.trainer(small.configured(tmp_path, {}, trace="1-2"), ALONE)
    assert run.run() == 0
    assert capsys.readouterr().err.count(f"warning: {tmp_path / 'trace'}") == 1
    (told,) = continue_at(tmp_path, 5, run.reports)
    assert told == "trace is no report of a run and was set aside as trace.set-aside"
