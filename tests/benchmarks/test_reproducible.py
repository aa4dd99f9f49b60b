"""benchmarks/reproducible.py: what it refuses, and a round of it."""

from __future__ import annotations

from typing import Any

import pytest

import benchmarks.reproducible
from argonne.models import ArgonneConfig
from argonne.parallel import ArgonneError, Layout, ProcessGroups
from benchmarks.reproducible import Flags, all_reduces, check, steps
from tests.pool import RankPool

REFUSALS: dict[str, tuple[Flags, int, str]] = {
    "ranks": (Flags(), 1, "nproc=1 has nothing to sum over; legal: 2 or more"),
    "iterations": (Flags(iterations=0), 2, "iterations=0 is not legal; legal: 1 or more"),
    "seconds": (Flags(seconds=0.0), 2, "seconds=0.0 is not legal; legal: more than 0"),
    "sizes": (Flags(sizes=("much",)), 2, "sizes='much'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_compared_is_refused(case: str) -> None:
    flags, ranks, message = REFUSALS[case]
    with pytest.raises(ArgonneError, match=f"^{message}"):
        check(flags, ranks)
    check(Flags(), 2)


def one_round(groups: ProcessGroups) -> dict[str, Any]:
    return all_reduces(Flags(sizes=("8K", "1M"), iterations=1, seconds=0.01), groups)


def test_each_group_of_ranks_sums_each_message_both_ways(ranks: RankPool) -> None:
    report, *others = ranks.run(Layout(data=4), one_round)
    told = [(record["ranks"], record["bytes"]) for record in report["records"]]
    assert told == [(2, 2**13), (2, 2**20), (4, 2**13), (4, 2**20)]
    assert all(record["ratio"] > 0 and record["cpu_ratio"] > 0 for record in report["records"])
    assert [len(other["records"]) for other in others] == [4, 2, 2]


def small_steps(groups: ProcessGroups) -> dict[str, Any]:
    kept = benchmarks.reproducible.STEP_MODEL
    benchmarks.reproducible.STEP_MODEL = ArgonneConfig(32, 1, 4, 4, 100, max_position_embeddings=8)
    try:
        return steps(Flags(iterations=1, seconds=0.01), groups)
    finally:
        benchmarks.reproducible.STEP_MODEL = kept


def test_a_step_is_timed_in_each_layout_both_ways(ranks: RankPool) -> None:
    report, *_ = ranks.run(Layout(data=2), small_steps)
    assert [record["layout"] for record in report["records"]] == [
        "tensor", "tensor + sequence", "data", "data, zero1", "data, fsdp"
    ]  # fmt: skip
    assert all(record["ratio"] > 0 and record["cpu_ratio"] > 0 for record in report["records"])
