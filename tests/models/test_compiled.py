"""Compiled blocks compute what eager ones do, are compiled before the first step, and never again."""

from __future__ import annotations

import pytest
import torch

from argonne.models.recompute import Recompute
from argonne.parallel import Layout
from tests.models.compiled import Case, eager_and_compiled, refused, without_a_compiler
from tests.pool import RankPool

TP = Layout(tensor=2)
FAST = [
    Case(documents=True, as_bounds=True),
    Case(Layout(tensor=2, sequence_parallel=True), documents=True),
    Case(Layout(data=2), "fsdp", recompute=Recompute.FULL),
    Case(Layout(pipeline=2), family="argonne1"),
]
OTHERS = [
    Case(documents=True),
    Case(TP),
    Case(Layout(pipeline=2), documents=True),
    Case(Layout(tensor=2, uneven_shards=True)),
    Case(Layout(context=2), "zero1"),
    Case(Layout(context=2), documents=True),
    Case(TP, family="qwen3", recompute=Recompute.SELECTIVE),
    Case(TP, family="qwen2"),
    Case(TP, family="mistral"),
    Case(TP, family="argonne1", documents=True),
    Case(Layout(data=2), "fsdp", precision=torch.bfloat16),
    Case(TP, precision=torch.bfloat16),
    Case(TP, precision=torch.float64),
    Case(Layout(pipeline=2), schedule="interleaved"),
    Case(Layout(tensor=2, pipeline=2, sequence_parallel=True), documents=True, recompute=Recompute.FULL),
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}


def check(ranks: RankPool, case: Case, steps: int, interpreted: bool) -> None:
    for rank, (eager, compiled) in enumerate(ranks.run(case.layout, eager_and_compiled, case, steps, interpreted)):
        assert not compiled.problem
        assert eager.graphs == 0 < compiled.graphs == compiled.graphs_after, f"rank {rank}: graphs came later"
        assert compiled.breaks == 0
        tolerance = TOLERANCE[case.precision]
        assert compiled.losses == pytest.approx(eager.losses, rel=tolerance), f"rank {rank}"
        assert compiled.evaluated == pytest.approx(eager.evaluated, rel=tolerance)


@pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in OTHERS)], ids=str
)
def test_graphs_equal_eager_and_are_made_before_the_first_step(ranks: RankPool, case: Case) -> None:
    check(ranks, case, steps=3, interpreted=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [*FAST, *OTHERS], ids=str)
def test_twenty_compiled_steps_equal_eager_ones(ranks: RankPool, case: Case) -> None:
    check(ranks, case, steps=20, interpreted=False)


def test_ranks_that_would_send_different_things_are_told_before_anything_is_sent(ranks: RankPool) -> None:
    """The compiler makes one sum of two that are equal, on one rank alone: in a step, the other would wait for ever."""
    first, second = ranks.run(TP, refused, Case(TP))
    assert first == second
    assert first.startswith("rank 1 would not send in model.layers.2, compiled, what rank 0 does: as number 4 ")
    assert "all_reduce(float32 [32, 16]) over tensor in forward, not all_reduce(" in first
    assert first.endswith("; legal: --disable-compile")
    assert "\n" not in first


def test_where_one_rank_cannot_compile_all_are_eager(ranks: RankPool) -> None:
    for eager, compiled in ranks.run(TP, without_a_compiler, Case(TP), 1):
        assert compiled.problem.startswith("rank 1 cannot compile model.layers.0 (RuntimeError: no")
        assert "no compiler is here" in compiled.problem
        assert "\n" not in compiled.problem
        assert compiled.problem.endswith("): every rank computes eagerly")
        assert compiled.losses == eager.losses
        assert all(map(torch.equal, compiled.weights, eager.weights))
