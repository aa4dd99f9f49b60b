"""Cross-entropy over a shared-out vocabulary equals that of the whole logits, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import (
    IGNORE_INDEX,
    Layout,
    Objective,
    ProcessGroups,
    VocabularyRange,
    vocab_parallel_cross_entropy,
)
from argonne.parallel.tensor_parallel import cross_entropy as module
from tests.parallel.operands import SIZES
from tests.pool import RankPool
from tests.whole import assert_close


def run(
    groups: ProcessGroups,
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    chunk: int | None = None,
    objective: Objective = Objective(),
) -> tuple[Tensor, Tensor]:
    """The loss on this rank and the gradient of its logits, for the loss's gradient ``weight``."""
    axis = groups.tensor
    vocabulary = VocabularyRange.of_rank(logits.shape[-1], axis.size, axis.rank)
    # A slice of wider rows, as the head returns it where it has padding.
    padded = F.pad(logits[..., vocabulary.start : vocabulary.stop], (0, vocabulary.rows - vocabulary.tokens))
    local = padded[..., : vocabulary.tokens].detach().requires_grad_()
    kept = local.detach().clone()
    usual = module._CHUNK
    module._CHUNK = usual if chunk is None else {"cpu": chunk}
    try:
        loss = vocab_parallel_cross_entropy(local, targets, vocabulary, axis, objective)
        loss.backward(weight)
    finally:
        module._CHUNK = usual
    assert torch.equal(local.detach(), kept), "the caller's logits were changed"
    assert local.grad is not None
    return loss.detach(), local.grad


def dense(logits: Tensor, targets: Tensor, weight: Tensor, objective: Objective = Objective()) -> tuple[Tensor, Tensor]:
    """The losses and the gradient of the logits in float64, written from the definition."""
    logits = logits.double().requires_grad_()
    loss = dense_losses(logits, targets, objective)
    loss.backward(weight.double())
    return loss.detach(), logits.grad


def dense_losses(logits: Tensor, targets: Tensor, objective: Objective = Objective()) -> Tensor:
    """-log softmax expected under the smoothed target, and the square of the softmax's log normaliser."""
    counted = targets != objective.ignore_index
    log_sum = logits.logsumexp(-1)
    surprise = log_sum[..., None] - logits
    at_target = surprise.gather(-1, torch.where(counted, targets, 0)[..., None])[..., 0]
    smoothing = objective.label_smoothing
    # Left out rather than multiplied by zero: a logit may be -inf.
    loss = (1 - smoothing) * at_target + smoothing * surprise.mean(-1) if smoothing else at_target
    return torch.where(counted, loss + objective.z_loss * log_sum**2, 0.0)


def draw(shape: tuple[int, ...], vocabulary: int, seed: int, ignored: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(*shape, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < ignored] = IGNORE_INDEX
    return logits, targets, torch.randn(shape, generator=generator, dtype=torch.float64)


def check(ranks: RankPool, size: int, logits: Tensor, targets: Tensor, weight: Tensor, tolerance: float) -> None:
    results = ranks.run(Layout(tensor=size), run, logits, targets, weight)
    expected, expected_gradient = dense(logits, targets, weight)
    for rank, (loss, _) in enumerate(results):
        assert loss.dtype == torch.promote_types(logits.dtype, torch.float32)
        # The size of a term: what the loss is rounded beside, where a certain token makes it nearly zero.
        size_of_terms = logits.double().norm().item()
        assert_close(loss.double(), expected, tolerance, f"loss on rank {rank}", scale=size_of_terms)
        assert torch.equal(loss, results[0][0]), f"rank {rank} has another loss than rank 0"
    gradient = torch.cat([gradient for _, gradient in results], dim=-1)
    assert gradient.dtype == logits.dtype
    # A gradient in half width is rounded once, to 8 bits.
    rounding = 2**-8 if logits.dtype == torch.bfloat16 else tolerance
    scale = weight.norm().item()
    assert_close(gradient.double(), expected_gradient, rounding, "gradient of the logits", scale=scale)
    assert (gradient[targets == IGNORE_INDEX] == 0).all()


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_float64_loss_and_gradient_equal_dense(ranks: RankPool, size: int) -> None:
    @given(
        st.lists(st.integers(0, 5), min_size=1, max_size=3),
        st.integers(1, 90),
        st.integers(0, 2**31),
        st.sampled_from([0.0, 0.3, 1.0]),
    )
    @example([2, 3], 5, 0, 0.0)  # three ranks of four without a token
    @example([0], 9, 0, 0.0)  # no position at all
    @example([2, 3], 9, 0, 1.0)  # no position with a loss
    def claim(shape: list[int], vocabulary: int, seed: int, ignored: float) -> None:
        check(ranks, size, *draw(tuple(shape), vocabulary, seed, ignored), tolerance=1e-12)

    claim()


@pytest.mark.parametrize("size", SIZES, scope="module")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logits_have_a_float32_loss_equal_to_float64_arithmetic_on_them(
    ranks: RankPool, size: int, dtype: torch.dtype
) -> None:
    logits, targets, weight = draw((4, 9), 53, 3, 0.2)
    tolerance = 2**-10 if dtype == torch.float16 else 2e-6
    check(ranks, size, logits.to(dtype), targets, weight.float(), tolerance)


@pytest.mark.parametrize("size", SIZES, scope="module")
@pytest.mark.parametrize("shift", [1e3, -1e3, 1e6])
def test_a_shift_of_all_logits_changes_nothing(ranks: RankPool, size: int, shift: float) -> None:
    logits, targets, weight = draw((4, 5), 37, 8, 0.1)
    # Multiples of 1/8 survive the shift exactly, so the two losses are of the same differences.
    logits = (logits * 8).round() / 8
    plain = ranks.run(Layout(tensor=size), run, logits, targets, weight)
    shifted = ranks.run(Layout(tensor=size), run, logits + shift, targets, weight)
    expected, expected_gradient = dense(logits, targets, weight)
    for (loss, _), (moved, _) in zip(plain, shifted, strict=True):
        assert_close(loss, expected, 1e-12, "loss")
        assert_close(moved, expected, 1e-12, "loss of shifted logits")
    gradient = torch.cat([gradient for _, gradient in shifted], dim=-1)
    assert_close(gradient, expected_gradient, 1e-12, "gradient of shifted logits")


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_huge_float32_logits_stay_finite(ranks: RankPool, size: int) -> None:
    logits, targets, weight = draw((6,), 29, 2, 0.0)
    logits = (logits * 1e4).float()
    check(ranks, size, logits, targets, weight.float(), 1e-6)


@pytest.mark.parametrize("size", SIZES, scope="module")
@pytest.mark.parametrize("chunk", [1, 20, 64])
def test_rows_taken_at_a_time_do_not_change_a_bit(ranks: RankPool, size: int, chunk: int) -> None:
    logits, targets, weight = draw((3, 7), 41, 6, 0.2)
    whole = ranks.run(Layout(tensor=size), run, logits, targets, weight)
    chunked = ranks.run(Layout(tensor=size), run, logits, targets, weight, chunk)
    for (loss, gradient), (chunked_loss, chunked_gradient) in zip(whole, chunked, strict=True):
        assert torch.equal(chunked_loss, loss)
        assert torch.equal(chunked_gradient, gradient)


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_the_mean_over_counted_positions_equals_torch(ranks: RankPool, size: int) -> None:
    logits, targets, _ = draw((5, 6), 23, 12, 0.4)
    counted = (targets != IGNORE_INDEX).sum()
    weight = torch.full(targets.shape, 1 / counted.item(), dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf.flatten(0, 1), targets.flatten())
    expected.backward()
    results = ranks.run(Layout(tensor=size), run, logits, targets, weight)
    for loss, _ in results:
        assert_close(loss.sum() / counted, expected.detach(), 1e-12, "mean loss")
    gradient = torch.cat([gradient for _, gradient in results], dim=-1)
    assert_close(gradient, leaf.grad, 1e-12, "gradient of the mean loss")


def loss_or_refuse(groups: ProcessGroups, logits: Tensor, targets: Tensor) -> Tensor | str:
    try:
        return run(groups, logits, targets, torch.ones(len(targets)))[0]
    except (ValueError, IndexError):
        return "refused"


@pytest.mark.parametrize("size", [1, 2], scope="module")
@pytest.mark.parametrize("target", [29, -1])
def test_a_target_outside_the_vocabulary_has_no_plausible_loss(ranks: RankPool, size: int, target: int) -> None:
    logits, targets, _ = draw((3,), 29, 2, 0.0)
    targets[1] = target
    for found in ranks.run(Layout(tensor=size), loss_or_refuse, logits, targets):
        assert isinstance(found, str) or not found[1].isfinite(), f"loss {found[1]:.3f} of a target that is no token"
