"""Stages: balanced as well as they can be, held by one rank each; bubbles as the papers have them; refusals."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.parallel import LayoutError
from argonne.parallel.pipeline_parallel.plan import SCHEDULES, PipelinePlan, balance, bubble_fraction

COSTS = st.lists(st.integers(1, 9).map(float), min_size=1, max_size=8)


@given(COSTS, st.data(), st.integers(0, 20), st.integers(0, 20))
def test_no_other_cut_has_a_cheaper_dearest_stage(
    costs: list[float], data: st.DataObject, first: int, last: int
) -> None:
    stages = data.draw(st.integers(1, len(costs)))

    def dearest(runs: list[range]) -> float:
        totals = [sum(costs[block] for block in run) for run in runs]
        totals[0] += first
        totals[-1] += last
        return max(totals)

    found = balance(costs, stages, first, last)
    assert [block for run in found for block in run] == list(range(len(costs)))
    assert all(len(run) for run in found)
    every = []
    for cuts in combinations(range(1, len(costs)), stages - 1):
        edges = [0, *cuts, len(costs)]
        every.append([range(a, b) for a, b in pairwise(edges)])
    assert dearest(found) == min(map(dearest, every))


def test_a_heavy_head_leaves_the_last_stage_fewer_blocks() -> None:
    assert [len(run) for run in balance([1.0] * 24, 4, last=3)] == [6, 7, 7, 4]
    assert [len(run) for run in balance([1.0] * 8, 4)] == [2, 2, 2, 2]


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(LayoutError, match="2 blocks cannot make 3 stages; legal: 1 to 2"):
        balance([1.0, 1.0], 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_stage_is_held_once(schedule: str, ranks: int) -> None:
    plan = PipelinePlan.of(schedule, ranks, 3)  # type: ignore[arg-type]
    held = [plan.held(rank) for rank in range(ranks)]
    assert sorted(stage for stages in held for stage in stages) == list(range(plan.stages))
    assert {len(stages) for stages in held} == {plan.stages_per_rank}
    if schedule == "zb":  # the V: the first rank has both ends
        assert plan.rank_of(0) == plan.rank_of(plan.stages - 1) == 0


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@given(st.integers(1, 8), st.integers(0, 12))
def test_the_bubble_of_equal_stages_is_the_papers(schedule: str, ranks: int, more: int) -> None:
    micro_batches = ranks + more
    plan = PipelinePlan(ranks, schedule)  # type: ignore[arg-type]
    found = bubble_fraction(plan.single_stage_order(micro_batches), [1.0] * ranks)
    assert found == pytest.approx((ranks - 1) / (micro_batches + ranks - 1), abs=1e-12)


def test_a_dear_stage_makes_the_others_wait() -> None:
    order = PipelinePlan(2, "1f1b").single_stage_order(100)
    assert bubble_fraction(order, [1.0, 3.0]) == pytest.approx(1 / 3, abs=0.01)


def test_refusals_name_the_field_and_what_is_legal() -> None:
    def refused(words: str) -> pytest.RaisesExc[LayoutError]:
        return pytest.raises(LayoutError, match=words)  # type: ignore[return-value]

    with refused("pipeline_schedule='pipedream' is not known; legal: 1f1b, interleaved, zb, gpipe"):
        PipelinePlan.of("pipedream", 2)  # type: ignore[arg-type]
    with refused("pipeline_interleave=1 is not legal with interleaved; legal: 2 or more"):
        PipelinePlan.of("interleaved", 2, 1)
    with refused(r"num_hidden_layers=5 is less than the 6 stages of pipeline_parallel=3 with zb .* legal .*: 1, 2"):
        PipelinePlan.of("zb", 3).check_layers(5)
    with refused("gradient_accumulation_steps=3 is less than pipeline_parallel=4: 1f1b .* legal: 4 or more"):
        PipelinePlan.of("1f1b", 4).check_micro_batches(3)
    with refused(r"gradient_accumulation_steps=5 cannot be .* interleaved; legal: a multiple of 2 \(4 or 6\)"):
        PipelinePlan.of("interleaved", 2).check_micro_batches(5)
    PipelinePlan.of("gpipe", 4).check_micro_batches(1)
    PipelinePlan.of("zb", 4).check_micro_batches(1)
