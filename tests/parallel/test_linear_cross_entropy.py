"""The head and the cross-entropy in one equal dense float64 arithmetic, however many chunks the tokens are cut into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import (
    IGNORE_INDEX,
    Layout,
    Objective,
    Precision,
    ProcessGroups,
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_logits,
)
from argonne.parallel.tensor_parallel import linear_cross_entropy as module
from tests.parallel.operands import SEEDS, SIZES, fill, own_tokens, under, values, whole_tokens
from tests.parallel.test_cross_entropy import dense_losses
from tests.pool import RankPool
from tests.whole import Parts, assemble, parts_of

PLAIN = Objective()
EVERYTHING = Objective(label_smoothing=0.1, z_loss=0.01, ignore_index=2)


@dataclass(frozen=True)
class Case:
    """A head and its operands, which every process makes again from the seed."""

    tokens: int
    vocabulary: int
    hidden: int = 5
    objective: Objective = PLAIN
    reduction: str = "sum"
    tied: bool = False
    sequence: bool = False
    chunk: int = 10**6
    """Tokens taken at a time."""
    frozen: str = ""
    """``x``, ``weight`` or both."""
    fused: bool = True
    """Or by ``vocab_parallel_logits`` and ``vocab_parallel_cross_entropy``."""
    parameters: torch.dtype = torch.float64
    compute: torch.dtype = torch.float64
    seed: int = 0

    @property
    def weight(self) -> Tensor:
        return values(self.vocabulary, self.hidden, kind="normal", seed=self.seed).to(self.parameters)

    @property
    def x(self) -> Tensor:
        return values(self.tokens, self.hidden, kind="normal", seed=self.seed + 1).to(self.compute)

    @property
    def targets(self) -> Tensor:
        """A third of them ignored."""
        generator = torch.Generator().manual_seed(self.seed)
        targets = torch.randint(0, self.vocabulary, (self.tokens,), generator=generator)
        return targets.masked_fill(torch.rand(self.tokens, generator=generator) < 1 / 3, self.objective.ignore_index)

    @property
    def scale(self) -> Tensor:
        """The gradient of the loss, or of the losses."""
        if self.reduction == "sum":
            return torch.tensor(0.37, dtype=torch.float64)
        return values(self.tokens, kind="normal", seed=self.seed + 2)


@dataclass(frozen=True)
class Found:
    loss: Tensor
    parts: Tensor
    """The sums of ``Objective.parts``, or those of each position."""
    x_gradient: Tensor | None
    weight_gradient: Parts | None
    padding: float
    """What is in the gradient of the padding rows."""


def build(groups: ProcessGroups, case: Case) -> tuple[VocabParallelEmbedding | VocabParallelHead, Tensor]:
    """The holder of the weight, and this rank's input."""
    kind = VocabParallelEmbedding if case.tied else VocabParallelHead
    holder = kind(case.vocabulary, case.hidden, groups, precision=Precision(case.parameters, case.compute))
    fill(holder, groups, {"weight": case.weight})
    holder.weight.requires_grad_("weight" not in case.frozen)
    return holder, own_tokens(case.x, groups).clone().requires_grad_("x" not in case.frozen)


@contextmanager
def chunks_of(case: Case) -> Iterator[None]:
    """Forward and backward inside take ``case.chunk`` tokens at a time."""
    usual = module._CHUNK, module._FEWEST
    module._CHUNK, module._FEWEST = {"cpu": 1}, case.chunk
    try:
        yield
    finally:
        module._CHUNK, module._FEWEST = usual


def loss_of(
    x: Tensor, holder: VocabParallelEmbedding | VocabParallelHead, case: Case, parts: list[Tensor] | None = None
) -> Tensor:
    if case.fused:
        return vocab_parallel_linear_cross_entropy(x, holder, case.targets, case.objective, case.reduction, parts=parts)
    logits = vocab_parallel_logits(x, holder)
    losses = vocab_parallel_cross_entropy(logits, case.targets, holder.range, holder.axis, case.objective, parts=parts)
    return losses.sum() if case.reduction == "sum" else losses


def train(groups: ProcessGroups, case: Case) -> Found:
    groups = under(groups, case.sequence)
    holder, x = build(groups, case)
    kept = x.detach().clone(), holder.weight.detach().clone()
    found: list[Tensor] | None = [] if case.objective.parts else None
    with chunks_of(case):
        loss = loss_of(x, holder, case, found)
        if loss.requires_grad:
            loss.backward(case.scale.to(loss.dtype))
    assert torch.equal(x.detach(), kept[0]), "x was overwritten"
    assert torch.equal(holder.weight.detach(), kept[1]), "the weight was overwritten"
    gradient = holder.weight.grad
    padding = 0.0 if gradient is None else gradient[holder.range.tokens :].abs().sum().item()
    weight_gradient = None if gradient is None else parts_of(holder, groups, lambda p: p.grad)
    parts = torch.cat(found, 1) if found else torch.empty(len(case.objective.parts), 0)
    return Found(loss.detach(), parts, x.grad, weight_gradient, padding)


def dense(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the gradients of x and of the weight, in float64 from the same rounded operands."""
    x, weight = case.x.double().requires_grad_(), case.weight.to(case.compute).double().requires_grad_()
    losses = dense_losses(x @ weight.T, case.targets, case.objective)
    loss = losses.sum() if case.reduction == "sum" else losses
    loss.backward(case.scale)
    return loss.detach(), x.grad, weight.grad


PARTS = ("loss", "gradient of x", "gradient of the weight")


def errors(results: list[Found], case: Case) -> tuple[float, float, float]:
    """Of each of ``PARTS``, relative to its size or to that of the terms it is made of."""
    expected = dense(case)
    for rank, found in enumerate(results):
        assert torch.equal(found.loss, results[0].loss), f"rank {rank} has another loss than rank 0"
        assert found.padding == 0, f"gradient of padding rows on rank {rank}"
    x_gradient = whole_tokens([found.x_gradient for found in results], case.sequence)
    weight_gradient = assemble(found.weight_gradient for found in results)["weight"]
    size = case.scale.norm().item() + 1e-300  # a gradient is at most about this times the other factor
    return tuple(
        ((found.double() - whole).norm() / max(whole.norm().item(), least)).item()
        for found, whole, least in zip(
            (results[0].loss, x_gradient, weight_gradient), expected, (case.tokens + 1, size, size), strict=True
        )
    )


def dense_parts(case: Case) -> Tensor:
    """Each of ``Objective.parts`` as the difference that it makes to the loss: ``[parts, tokens]``."""
    logits = case.x.double() @ case.weight.double().T
    alone = dense_losses(logits, case.targets, replace(case.objective, label_smoothing=0.0, z_loss=0.0))
    added = [
        dense_losses(logits, case.targets, replace(case.objective, **{other: 0.0})) - alone
        for name, other in (("label_smoothing", "z_loss"), ("z_loss", "label_smoothing"))
        if name in case.objective.parts
    ]
    return torch.stack([alone, *added]) if added else torch.empty(0, 0)


def check(ranks: RankPool, size: int, case: Case) -> None:
    results = ranks.run(Layout(tensor=size), train, case)
    found = errors(results, case)
    if case.objective.parts and case.tokens:
        for result in results:
            torch.testing.assert_close(result.parts, dense_parts(case), rtol=1e-10, atol=1e-10)
    for what, error in zip(PARTS, found, strict=True):
        assert error < 1e-10, f"{what} is off by {error:.1e}"


@st.composite
def cases(draw: st.DrawFn, size: int) -> Case:
    sequence = draw(st.booleans())
    tokens = size * draw(st.integers(1, 5)) if sequence else draw(st.integers(1, 20))
    objective = Objective(
        draw(st.sampled_from([0.0, 0.1, 1.0])),
        draw(st.sampled_from([0.0, 0.01])),
        draw(st.sampled_from([IGNORE_INDEX, -1, 0])),
    )
    return Case(
        tokens,
        draw(st.integers(1, 90)),
        draw(st.integers(1, 6)),
        objective,
        draw(st.sampled_from(["sum", "none"])),
        tied=draw(st.booleans()),
        sequence=sequence,
        chunk=draw(st.sampled_from([1, 3, 7, 10**6])),
        seed=draw(SEEDS),
    )


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_loss_and_gradients_equal_dense_float64(ranks: RankPool, size: int) -> None:
    @given(cases(size))
    @settings(max_examples=50)
    @example(Case(24, 5, objective=EVERYTHING, sequence=True, chunk=5))  # of four ranks, three without a token
    @example(Case(24, 33, objective=EVERYTHING, reduction="none", chunk=5))  # of four, one with a single token
    @example(Case(0, 9, objective=EVERYTHING))
    def claim(case: Case) -> None:
        check(ranks, size, case)

    claim()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("size", SIZES, scope="module")
def test_it_is_as_exact_in_half_width_as_the_head_and_the_loss_apart(
    ranks: RankPool, size: int, reduction: str
) -> None:
    for parameters, compute in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ):
        case = Case(48, 53, 16, EVERYTHING, reduction, chunk=10, parameters=parameters, compute=compute)
        results = ranks.run(Layout(tensor=size), train, case)
        for rank, found in enumerate(results):
            assert found.loss.dtype == torch.float32, f"rank {rank}"
            assert found.x_gradient.dtype == compute, f"rank {rank}"
            assert found.weight_gradient is None or all(part.dtype == parameters for _, part in found.weight_gradient)
        apart = errors(ranks.run(Layout(tensor=size), train, replace(case, fused=False)), case)
        for what, error, other in zip(PARTS, errors(results, case), apart, strict=True):
            assert error < max(1.5 * other, 1e-6), f"{what} is off by {error:.1e}, apart by {other:.1e}"


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("size", [1, 2], scope="module")
def test_what_is_frozen_has_no_gradient_and_the_rest_keeps_its_own(ranks: RankPool, size: int, reduction: str) -> None:
    case = Case(12, 21, objective=EVERYTHING, reduction=reduction, chunk=5)
    trained = ranks.run(Layout(tensor=size), train, case)
    for frozen in ("x", "weight", "x and weight"):
        results = ranks.run(Layout(tensor=size), train, replace(case, frozen=frozen))
        for rank, (found, whole) in enumerate(zip(results, trained, strict=True)):
            assert torch.equal(found.loss, whole.loss), f"loss on rank {rank} with frozen {frozen}"
            assert (found.x_gradient is None) == ("x" in frozen), f"rank {rank} with frozen {frozen}"
            assert (found.weight_gradient is None) == ("weight" in frozen), f"rank {rank} with frozen {frozen}"
            if "x" not in frozen:
                assert torch.equal(found.x_gradient, whole.x_gradient), f"rank {rank}"
            if "weight" not in frozen:
                for (region, one), (_, other) in zip(found.weight_gradient, whole.weight_gradient, strict=True):
                    assert torch.equal(one, other), f"{region.name} on rank {rank}"
