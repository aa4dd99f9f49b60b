"""benchmarks/check_cost.py: what it refuses, and a round of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from argonne.parallel import ArgonneError, Layout, ProcessGroups
from benchmarks.check_cost import Flags, check, contestants, times
from tests.pool import RankPool


def test_no_round_and_an_unknown_shape_are_refused() -> None:
    with pytest.raises(ArgonneError, match="rounds=0 is not legal; legal: 1 or more"):
        check(Flags(rounds=0), 2)
    with pytest.raises(ArgonneError, match="preset='nothing' is not known; legal: demo"):
        check(Flags(preset="nothing"), 2)


def test_one_process_has_one_layout_and_several_have_every_kind_of_replicas() -> None:
    assert list(contestants(1)) == ["one process"]
    assert [kind for _, kind in contestants(2).values()] == ["replicate", "replicate", "zero1", "fsdp"]


def one_round(groups: ProcessGroups, directory: str) -> tuple[int, int, list[str]]:
    saves, checks = times(Flags(rounds=1), groups, "replicate", Path(directory))
    assert min(saves + checks) > 0
    return len(saves), len(checks), sorted(path.name for path in Path(directory).iterdir())


def test_each_round_saves_and_checks_once(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(Layout(data=2), one_round, str(tmp_path)) == [(1, 1, ["step_00000000"])] * 2
