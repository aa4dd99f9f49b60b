"""What ``resume.py`` and ``generate.py`` begin with: the state that was saved last, and not one that looks like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from argonne.training.schedule import Schedule
from tests.integration.runs import metrics, succeed

pytestmark = pytest.mark.slow


def test_resume_trains_no_step_again_and_a_re_warm_up_goes_on_through_later_continuations(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    """A run begun anew would repeat every number but the times: those of the steps before must stay."""
    succeed("pretrain", {**flags, "--output-dir": tmp_path, "--stop-at-step": 4}, nproc=1)
    first = metrics(tmp_path)
    again = {"--checkpoint-path": tmp_path, "--sample-tokens": 0}
    reset = {"--reset-optimizer": None, "--rewarmup-steps": 6}
    told = succeed("resume", {**again, **reset, "--stop-at-step": 6}, nproc=1)
    assert "continuing from" in told
    assert "step_00000004" in told
    second = metrics(tmp_path)
    assert second[:4] == first
    succeed("resume", again, nproc=1)
    lines = metrics(tmp_path)
    assert lines[:6] == second
    assert [line["step"] for line in lines] == list(range(1, 13))
    plain = Schedule(3e-3, 1e-5, 3, 12)
    for line in lines:
        step = line["step"]
        height = min(1.0, (step - 4) / 6) if step > 4 else 1.0
        expected = 1e-5 + height * (plain.learning_rate(step) - 1e-5)
        assert line["learning_rate"] == pytest.approx(expected, rel=1e-12), f"step {step}"


def test_generate_writes_from_the_newest_checkpoint_of_a_run(uninterrupted: Path) -> None:
    words = {"--max-new-tokens": 12, "--prompt": ["bad cap", "a"]}
    paths = [uninterrupted, uninterrupted / "step_00000012", uninterrupted / "step_00000004"]
    run, newest, older = (succeed("generate", {"--checkpoint-path": path, **words}, nproc=1) for path in paths)
    assert run == newest
    assert newest != older
