"""Label smoothing, z-loss and ignored targets over a shared-out vocabulary equal their definitions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import ArgonneError, Layout, Objective, VocabularyRange
from tests.parallel.operands import SEEDS, SIZES
from tests.parallel.test_cross_entropy import dense, draw, run
from tests.pool import RankPool
from tests.whole import assert_close

OBJECTIVES = st.builds(
    Objective,
    label_smoothing=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    ignore_index=st.sampled_from([-100, -1, 0, 3, 10**6]),  # also those of tokens
)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    vocabulary: int
    objective: Objective
    ignored: float = 0.3
    seed: int = 0

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        logits, targets, weight = draw(self.shape, self.vocabulary, self.seed, self.ignored)
        return logits, torch.where(targets == Objective().ignore_index, self.objective.ignore_index, targets), weight


CASES = st.builds(
    Case,
    st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple),
    st.integers(1, 90),
    OBJECTIVES,
    st.sampled_from([0.0, 0.3, 1.0]),
    SEEDS,
)
EVERYTHING = Objective(label_smoothing=0.1, z_loss=0.01, ignore_index=2)


def check(ranks: RankPool, size: int, logits: Tensor, targets: Tensor, weight: Tensor, objective: Objective) -> None:
    results = ranks.run(Layout(tensor=size), run, logits, targets, weight, None, objective)
    expected, expected_gradient = dense(logits, targets, weight, objective)
    scale = logits[logits.isfinite()].norm().item()  # of the terms that a loss is rounded beside
    for rank, (loss, _) in enumerate(results):
        assert_close(loss, expected, 1e-10, f"loss on rank {rank}", scale=scale)
        assert torch.equal(loss, results[0][0]), f"rank {rank} has another loss than rank 0"
    gradient = torch.cat([gradient for _, gradient in results], dim=-1)
    assert_close(gradient, expected_gradient, 1e-10, "gradient of the logits", scale=weight.norm().item())
    assert (gradient[targets == objective.ignore_index] == 0).all(), "an ignored position has a gradient"


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_loss_and_gradient_equal_the_definition_in_float64(ranks: RankPool, size: int) -> None:
    @given(CASES)
    @settings(max_examples=40)
    @example(Case((2, 3), 5, EVERYTHING))  # of four ranks, three without a token
    @example(Case((2, 3), 33, EVERYTHING))  # of four ranks, one with a single token
    @example(Case((0,), 9, EVERYTHING))
    @example(Case((2, 3), 9, EVERYTHING, ignored=1.0))
    def claim(case: Case) -> None:
        check(ranks, size, *case.operands(), case.objective)

    claim()


@pytest.mark.parametrize("size", SIZES, scope="module")
@pytest.mark.parametrize("vocabulary", [9, 53])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_loss_and_gradient_equal_those_of_torch(
    ranks: RankPool, size: int, vocabulary: int, smoothing: float
) -> None:
    objective = Objective(smoothing, ignore_index=4)
    logits, targets, weight = Case((31,), vocabulary, objective, seed=7).operands()
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, targets, ignore_index=4, label_smoothing=smoothing, reduction="none")
    expected.backward(weight)
    results = ranks.run(Layout(tensor=size), run, logits, targets, weight, None, objective)
    for rank, (loss, _) in enumerate(results):
        assert_close(loss, expected.detach(), 1e-10, f"loss on rank {rank}")
    gradient = torch.cat([gradient for _, gradient in results], dim=-1)
    assert_close(gradient, leaf.grad, 1e-10, "gradient of the logits")


@pytest.mark.parametrize("size", SIZES, scope="module")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits_have_a_float32_loss_equal_to_float64_arithmetic_on_them(
    ranks: RankPool, size: int, dtype: torch.dtype
) -> None:
    logits, targets, weight = Case((4, 9), 53, EVERYTHING).operands()
    logits = logits.to(dtype)
    expected, expected_gradient = dense(logits, targets, weight, EVERYTHING)
    results = ranks.run(Layout(tensor=size), run, logits, targets, weight.float(), None, EVERYTHING)
    for rank, (loss, _) in enumerate(results):
        assert loss.dtype == torch.float32
        assert_close(loss.double(), expected, 1e-6, f"loss on rank {rank}")
    gradient = torch.cat([gradient for _, gradient in results], dim=-1)
    assert gradient.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6  # once, to 8 bits
    assert_close(gradient.double(), expected_gradient, rounding, "gradient of the logits")


@pytest.mark.parametrize("size", [2, 3, 4], scope="module")
def test_a_rank_whose_logits_are_all_minus_infinity_adds_nothing(ranks: RankPool, size: int) -> None:
    objective = Objective(z_loss=0.01)
    for rank in range(size):
        logits, _, weight = draw((3, 4), 8 * size, 5, 0.0)
        masked = VocabularyRange.of_rank(8 * size, size, rank)
        logits[..., masked.start : masked.stop] = -torch.inf
        targets = torch.full((3, 4), 8 * ((rank + 1) % size) + 2)
        check(ranks, size, logits, targets, weight, objective)


@pytest.mark.parametrize("size", [1, 2], scope="module")
def test_a_single_position_has_a_scalar_loss(ranks: RankPool, size: int) -> None:
    check(ranks, size, *Case((), 19, EVERYTHING).operands(), EVERYTHING)


REFUSED = [
    ({"label_smoothing": -0.1}, "label_smoothing=-0.1 is not legal; legal: a number, 0 to 1"),
    ({"label_smoothing": 1.5}, "label_smoothing=1.5 is not legal; legal: a number, 0 to 1"),
    ({"label_smoothing": float("nan")}, "label_smoothing=nan is not legal; legal: a number, 0 to 1"),
    ({"z_loss": -1e-4}, "z_loss=-0.0001 is not legal; legal: 0 or more"),
    ({"z_loss": float("nan")}, "z_loss=nan is not legal; legal: 0 or more"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_an_objective_that_means_nothing_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ArgonneError) as refusal:
        Objective(**fields)
    assert str(refusal.value) == message
