"""One run that stays at its peak, and decays from its checkpoints: each is the run that decayed from there."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from argonne.launch.config_file import as_toml
from argonne.parallel import ArgonneError
from argonne.training.run.resume import check_decay, parse_resume
from argonne.training.schedule import Schedule
from tests.integration.runs import history, metrics, succeed, weights

pytestmark = pytest.mark.slow

STEADY = {"--schedule": "wsd", "--decay-steps": 0, "--total-steps": 1000, "--save-interval": 50, "--sample-tokens": 0}


def files(directory: Path) -> dict[str, str]:
    """What each file of a run is."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_branch_from_step_100_is_the_run_that_decayed_from_there_and_leaves_its_trunk_alone(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    """To the bit, weights and moments; a decay is gone on with; and another branch begins elsewhere."""
    trunk, branch, other, whole = (tmp_path / name for name in ("trunk", "branch", "other", "whole"))
    small = {**flags, "--block-size": 16, "--initial-batch-size": 1, "--gradient-accumulation-steps": 1}
    succeed("pretrain", {**small, **STEADY, "--output-dir": trunk, "--stop-at-step": 100}, nproc=1)
    before = files(trunk)

    decay = {"--decay-steps": 6, "--total-steps": 106}
    at = {"--checkpoint-path": trunk / "step_00000100", "--output-dir": branch}
    told = succeed("resume", {**at, **decay, "--stop-at-step": 103}, nproc=1)
    assert "changed from here on: schedule.decay_steps: 0 -> 6" in told
    succeed("resume", {"--checkpoint-path": branch}, nproc=1)  # in mid-decay, and told nothing
    succeed("pretrain", {**small, **STEADY, **decay, "--output-dir": whole}, nproc=1)
    assert history(branch) == history(whole)[100:]
    assert history(trunk) == history(whole)[:100]
    assert weights(branch) == weights(whole)
    rates = [line["learning_rate"] for line in metrics(branch)]
    assert rates == [1e-5 + (3e-3 - 1e-5) * (1 - n / 6) for n in range(1, 7)]

    elsewhere = {"--checkpoint-path": trunk / "step_00000050", "--output-dir": other, "--total-steps": 54}
    succeed("resume", {**elsewhere, "--decay-steps": 4, "--decay-shape": "sqrt"}, nproc=1)
    schedule = Schedule(3e-3, 1e-5, 3, 54, kind="wsd", decay_steps=4, decay_shape="sqrt")
    assert [line["learning_rate"] for line in metrics(other)] == [schedule.learning_rate(n) for n in range(51, 55)]
    assert files(trunk) == before

    if sys.version_info < (3, 11):  # which reads TOML only with another package
        return
    config = parse_resume(["--checkpoint-path", str(trunk), "--decay-steps=6", "--seed=0"])
    (tmp_path / "printed.toml").write_text(as_toml(config), encoding="utf-8")
    again = parse_resume(["--config", str(tmp_path / "printed.toml")])
    assert replace(again, file=config.file, arguments=config.arguments, given=again.given - {"config"}) == config


def test_a_decay_that_would_have_begun_before_the_checkpoint_is_refused() -> None:
    """Unless the checkpoint is in that very decay."""
    schedule = Schedule(3e-3, 1e-5, 3, 106, kind="wsd", decay_steps=6)
    for step, saved in ((100, {}), (106, {}), (103, asdict(schedule)), (9, {"kind": "cosine"})):
        check_decay(schedule, {"step": step, "schedule": saved})
    before = asdict(replace(schedule, decay_shape="sqrt"))
    for saved in (before, {"total_steps": 106}, None):
        with pytest.raises(ArgonneError) as refusal:
            check_decay(schedule, {"step": 101, "schedule": saved})
        assert str(refusal.value) == (
            "decay_steps=6 of total_steps=106 begin after step 100, which is before step 101, where the run is; "
            "legal: 0 to 5, or an earlier checkpoint"
        )
