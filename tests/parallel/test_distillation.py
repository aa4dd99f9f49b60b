"""Cross-entropy and divergence from a teacher equal a formula of whole logits in float64, however they are cut."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from argonne.parallel import (
    ArgonneError,
    Distillation,
    DistillationSoftmax,
    Layout,
    Objective,
    Precision,
    ProcessGroups,
    TeacherRows,
    VocabParallelHead,
    vocab_parallel_linear_cross_entropy,
)
from argonne.parallel.tensor_parallel import linear_cross_entropy as module
from argonne.training.counting import counted
from tests.parallel.operands import fill, own_tokens, under, values, whole_tokens
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close, parts_of

TOKENS, HIDDEN, OF_TEACHER = 12, 5, 7


@dataclass(frozen=True)
class Case:
    """A student's head and a teacher's hidden values and head, which every process makes again."""

    student: int = 29
    teacher: int = 29
    tokens: int = 29
    """Of the tokenizer: rows behind these are padding."""
    alpha: float = 0.5
    temperature: float = 1.0
    weighted: bool = False
    sequence: bool = False
    offset: float = 0.0
    """Is added to all logits of the teacher: no distribution changes."""

    @property
    def shared(self) -> int:
        return min(self.student, self.teacher, self.tokens)

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shapes = (TOKENS, HIDDEN), (self.student, HIDDEN), (TOKENS, OF_TEACHER), (self.teacher, OF_TEACHER)
        x, weight, seen, rows = (values(*shape, kind="normal", seed=number) for number, shape in enumerate(shapes))
        seen[:, 0] = 1
        rows[:, 0] = self.offset
        return x, weight, seen, rows

    @property
    def targets(self) -> Tensor:
        draw = torch.Generator().manual_seed(4)
        return torch.randint(self.student, (TOKENS,), generator=draw).masked_fill(torch.arange(TOKENS) % 5 == 3, -100)

    @property
    def scale(self) -> Tensor:
        return values(TOKENS, kind="normal", seed=9) if self.weighted else torch.tensor(0.37, dtype=torch.float64)


def by_hand(case: Case) -> tuple[Tensor, ...]:
    """The loss, its two parts and the gradients of x and of the weight, of logits that exist whole."""
    x, weight, seen, rows = case.operands()
    x, weight, targets = x.requires_grad_(), weight.requires_grad_(), case.targets
    logits, wanted, counted = x @ weight.T, seen @ rows.T, targets != -100
    picked = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = torch.where(counted, logits.logsumexp(1) - picked, 0.0)
    ours, theirs = ((z[:, : case.shared] / case.temperature).log_softmax(1) for z in (logits, wanted))
    divergence = torch.where(counted, (theirs.exp() * (theirs - ours)).sum(1), 0.0)
    losses = case.alpha * entropy + (1 - case.alpha) * case.temperature**2 * divergence
    loss = losses if case.weighted else losses.sum()
    loss.backward(case.scale)
    assert x.grad is not None
    assert weight.grad is not None
    return loss.detach(), torch.stack((entropy, divergence)).detach(), x.grad, weight.grad


def found_by(groups: ProcessGroups, case: Case, chunk: int) -> tuple[Tensor, Tensor, Tensor, Parts, float]:
    groups = under(groups, case.sequence)
    x, weight, seen, rows = case.operands()
    head = VocabParallelHead(case.student, HIDDEN, groups, precision=Precision(torch.float64, torch.float64))
    fill(head, groups, {"weight": weight})
    x = own_tokens(x, groups).clone().requires_grad_()
    first = head.range.start
    teacher = TeacherRows(seen, rows[first : max(first, min(head.range.stop, case.shared))], first, case.shared)
    arithmetic = DistillationSoftmax.beside(Distillation(case.alpha, case.temperature), teacher)
    usual, parts = (module._CHUNK, module._FEWEST), list[Tensor]()
    module._CHUNK, module._FEWEST = {"cpu": 1}, chunk
    try:
        loss = vocab_parallel_linear_cross_entropy(
            x, head, case.targets, Objective(), "none" if case.weighted else "sum", arithmetic, parts
        )
        loss.backward(case.scale)
    finally:
        module._CHUNK, module._FEWEST = usual
    assert x.grad is not None
    assert head.weight.grad is not None
    padding = head.weight.grad[head.range.tokens :].abs().sum().item()
    return loss.detach(), torch.cat(parts, 1), x.grad, parts_of(head, groups, lambda p: p.grad), padding


SIZES = [{}, {"teacher": 41}, {"student": 32, "teacher": 41}, {"student": 40, "teacher": 32}, {"teacher": 20}]
"""Alike; a larger teacher; padding of both (the student's more, the teacher's more); a teacher with fewer."""
CASES = [
    Case(alpha=alpha, temperature=temperature, **sizes)
    for sizes, alpha, temperature in itertools.product(SIZES, (0.0, 0.5, 1.0), (1.0, 2.0))
]
CASES += [replace(case, weighted=True) for case in CASES[2:4]] + [replace(CASES[15], sequence=True, weighted=True)]
CASES += [replace(CASES[8], sequence=True), replace(CASES[3], offset=1e4)]


def work(groups: ProcessGroups, chunk: int) -> list[tuple[Tensor, Tensor, Tensor, Parts, float]]:
    cases = [case for case in CASES if not (case.sequence and TOKENS % groups.tensor.size)]
    return [found_by(groups, case, chunk) for case in cases]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_loss_and_gradients_equal_a_formula_of_whole_logits(ranks: RankPool, size: int) -> None:
    """At four ranks the last one has no token of the smallest teacher, and none of the student at all."""
    by_rank = ranks.run(Layout(tensor=size), work, 8)
    for number, case in enumerate(CASES):
        expected, found = by_hand(case), [rank[number] for rank in by_rank]
        for loss, parts, _, _, padding in found:
            assert_close(loss, expected[0], 1e-9, f"{case}: loss")
            assert_close(parts, expected[1], 1e-9, f"{case}: parts")
            assert padding == 0
        assert_close(whole_tokens([each[2] for each in found], case.sequence), expected[2], 1e-9, f"{case}: x")
        weight = assemble([each[3] for each in found])["weight"]
        assert_close(weight, expected[3], 1e-9, f"{case}: weight")


def test_memory_is_that_of_the_loss_of_pretraining() -> None:
    """At a vocabulary of 49,152 and 2,048 tokens, counted: within 1.2 of the loss without a teacher."""
    peaks = []
    for temperature, dtype in (
        (None, torch.float32),
        (2.0, torch.float32),
        (None, torch.bfloat16),
        (2.0, torch.bfloat16),
    ):
        with counted() as count:
            groups, precision = ProcessGroups.single(), Precision(torch.float32, dtype)
            head = VocabParallelHead(49_152, 576, groups, precision=precision)
            x, targets = torch.zeros(2048, 576, dtype=dtype, requires_grad=True), torch.zeros(2048, dtype=torch.int64)
            seen, rows = torch.zeros(2048, 960, dtype=dtype), torch.zeros(49_152, 960, dtype=dtype)
            given, count.peak = count.live, count.live
            extra = {}
            if temperature is not None:
                teacher = TeacherRows(seen, rows, 0, 49_152)
                extra = {"arithmetic": DistillationSoftmax.beside(Distillation(0.5, temperature), teacher)}
            vocab_parallel_linear_cross_entropy(x, head, targets, **extra).backward()
            peaks.append((count.peak - given) / 2**20)
            del x, head, targets, seen, rows
    assert peaks[1] < 1.2 * peaks[0], peaks
    assert peaks[3] < 1.2 * peaks[2], peaks


@pytest.mark.parametrize("value", [{"alpha": 1.5}, {"alpha": float("nan")}, {"temperature": 0}, {"temperature": True}])
def test_what_is_no_weight_and_no_temperature_is_refused(value: dict[str, float]) -> None:
    with pytest.raises(ArgonneError, match=f"{next(iter(value))}=.* is not legal"):
        Distillation(**value)
