"""Why and how a run leaves before its last step: a signal, ``--wall-time``, and what its process then ends with."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from argonne.checkpoint import checkpoints, load_trainer
from argonne.launch.refusal import NOTHING_GAINED, STOPPING
from argonne.launch.signals import STOP
from argonne.parallel import Layout, ProcessGroups
from argonne.training import report, trainer
from argonne.training.trainer import WALL_TIME, Trainer
from tests.integration.runs import metrics
from tests.pool import RankPool
from tests.training.settled import SmallRun

ALONE = ProcessGroups.single()
FAR = 1e9  # seconds


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "plot_loss", lambda *what: False)
    monkeypatch.setattr(STOP, "number", None)


def start(small: SmallRun, directory: Path, **run: Any) -> Trainer:
    return small.trainer(small.configured(directory, {}, **run), ALONE)


def after(run: Trainer, step: int, act: Any) -> None:
    """``act()`` as soon as ``step`` is told."""
    tell = run.reports.step

    def told(record: dict[str, Any]) -> None:
        tell(record)
        if record["step"] == step:
            act()

    run.reports.step = told  # type: ignore[method-assign]


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_a_reason_to_leave_by_its_name(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    run = start(small, tmp_path)
    assert run._why_leave() == ""
    monkeypatch.setattr(STOP, "number", number)
    assert run._why_leave() == number.name
    run.feed.close()


@pytest.mark.parametrize(
    ("step", "saves"), [(1, [1]), (2, [2]), (3, [2, 3])], ids=["before any save", "at a save", "after a save"]
)
def test_a_signal_within_a_step_saves_once_at_its_end_and_says_how_to_go_on(
    small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int, saves: list[int]
) -> None:
    run = start(small, tmp_path)
    after(run, step, lambda: setattr(STOP, "number", signal.SIGTERM))
    assert run.run() == 128 + signal.SIGTERM
    assert [load_trainer(path)["step"] for path in checkpoints(tmp_path)] == saves
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, step + 1))
    told = capsys.readouterr()
    assert told.err == f"argonne: stopped by SIGTERM at step {step}, saved. The same command continues the run.\n"
    assert (f"leaving at step {step}: SIGTERM" in told.out) == (step != 2)


def test_a_signal_before_the_first_step_leaves_nothing(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(STOP, "number", signal.SIGINT)
    run = start(small, tmp_path)
    assert run.run() == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "argonne: stopped by SIGINT at step 0. The same command continues the run.\n"


def test_a_signal_that_comes_with_the_last_step_ends_the_run_as_finished(
    small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(small, tmp_path, stop_at_step=2)
    after(run, 2, lambda: setattr(STOP, "number", signal.SIGTERM))
    assert run.run() == 0
    assert capsys.readouterr().err == ""


def test_wall_time_leaves_when_what_is_left_may_not_hold_another_step_and_a_save(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(small, tmp_path, wall_time=1000.0)
    for step, save, needed in ((0.0, 1.0, 20.0), (40.0, 3.0, 80.0), (40.0, 50.0, 160.0)):
        run.step_seconds, run.save_seconds = step, save
        # 1.5 steps; two saves, though not less than 10 s or 2% of the limit
        assert run._time_to_leave(1000.0) == needed
        for ran, reason in ((999.0 - needed, ""), (1001.0 - needed, WALL_TIME)):
            monkeypatch.setattr(trainer, "seconds_since_start", lambda ran=ran: ran)
            assert run._why_leave() == reason
    assert run._time_to_leave(10.0) == 160.0
    run.step_seconds = run.save_seconds = 0.0
    assert run._time_to_leave(10.0) == 10.0
    run.feed.close()


def test_without_a_wall_time_no_clock_ends_a_run(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(small, tmp_path)
    monkeypatch.setattr(trainer, "seconds_since_start", lambda: FAR)
    assert run._why_leave() == ""
    run.feed.close()


def test_steps_and_saves_are_timed_for_it(small: SmallRun, tmp_path: Path) -> None:
    run = start(small, tmp_path, stop_at_step=2)
    first = run.save_seconds
    assert run.step_seconds == 0.0
    assert first == pytest.approx(3 * sum(s.parameter.nbytes for s in run.state.parameters) / 200e6)
    run.run()
    assert run.step_seconds == max(line["step_time"] for line in metrics(tmp_path))
    assert run.save_seconds > first


def test_a_wall_time_that_is_near_saves_and_is_a_success(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(small, tmp_path, wall_time=1e6)
    after(run, 3, lambda: monkeypatch.setattr(trainer, "seconds_since_start", lambda: FAR))
    assert run.run() == 0
    assert [load_trainer(path)["step"] for path in checkpoints(tmp_path)] == [2, 3]
    told = capsys.readouterr().err
    assert told == "argonne: stopped at step 3, saved: --wall-time is near. The same command continues the run.\n"


def test_a_wall_time_in_which_nothing_can_be_gained_says_how_much_can(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "seconds_since_start", lambda: 8.2)
    run = start(small, tmp_path, wall_time=12.0)
    assert run.run() == NOTHING_GAINED
    assert capsys.readouterr().err == (
        "argonne: nothing was gained: --wall-time 12 leaves no time for a step and a save after a start of 8 s; "
        "legal: 28 or more\n"
    )
    assert list(tmp_path.iterdir()) == []
    # With what it says is legal, a start that takes half as long again still finds time for a step.
    monkeypatch.setattr(trainer, "seconds_since_start", lambda: 1.5 * 8.2)
    again = start(small, tmp_path, wall_time=28.0)
    assert again._why_leave() == ""
    again.feed.close()


@pytest.mark.parametrize(("age", "gained"), [(5.0, True), (50.0, False)])
def test_what_this_command_saved_before_it_was_started_again_counts_as_gained(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, gained: bool
) -> None:
    start(small, tmp_path, stop_at_step=2).run()
    (checkpoint,) = checkpoints(tmp_path)
    then = time.time() - age
    os.utime(checkpoint / "manifest.json", (then, then))
    monkeypatch.setattr(trainer, "seconds_since_start", lambda: 20.0)
    run = small.trainer(small.configured(tmp_path, {}, wall_time=21.0), ALONE, checkpoint)
    assert run.run() == (0 if gained else NOTHING_GAINED)
    assert len(metrics(tmp_path)) == 2


def reasons(groups: ProcessGroups, small: SmallRun, directory: Path, asked: int, late: int) -> str:
    """What a rank leaves for when rank ``asked`` has been signalled and the clock of rank ``late`` is late."""
    run = small.trainer(small.configured(directory, {}, wall_time=1e6), groups)
    clock, rank = trainer.seconds_since_start, groups.world.rank
    trainer.seconds_since_start = lambda: FAR if rank == late else 0.0  # type: ignore[assignment]
    STOP.number = signal.SIGHUP if rank == asked else None
    try:
        return run._why_leave()
    finally:
        trainer.seconds_since_start, STOP.number = clock, None
        run.feed.close()


@pytest.mark.parametrize(
    ("asked", "late", "reason"), [(-1, -1, ""), (0, -1, "SIGHUP"), (2, -1, "SIGHUP"), (-1, 0, WALL_TIME), (-1, 2, "")]
)
def test_all_ranks_leave_together_for_a_signal_to_any_and_for_the_clock_of_the_first(
    ranks: RankPool, small: SmallRun, tmp_path: Path, asked: int, late: int, reason: str
) -> None:
    assert ranks.run(Layout(data=3), reasons, small, tmp_path, asked, late) == [reason] * 3
