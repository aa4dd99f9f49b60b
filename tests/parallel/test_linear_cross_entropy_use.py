"""How the fused head and loss are used: tied to the embedding, evaluated, differentiated twice, and in what memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from argonne.parallel import (
    Layout,
    Precision,
    ProcessGroups,
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_parallel_linear_cross_entropy,
)
from argonne.parallel.tensor_parallel import linear_cross_entropy
from tests.parallel.operands import SIZES, fill, under, values
from tests.parallel.test_cross_entropy import dense_losses
from tests.parallel.test_linear_cross_entropy import EVERYTHING, Case, build, chunks_of, loss_of
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close, parts_of

DOUBLE = Precision(torch.float64, torch.float64)
VOCABULARY, HIDDEN = 37, 5


def through_both_ends(
    groups: ProcessGroups, sequence: bool, reduction: str, weight: Tensor, ids: Tensor
) -> tuple[Tensor, Parts]:
    groups = under(groups, sequence)
    embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, groups, precision=DOUBLE)
    fill(embedding, groups, {"weight": weight})
    x = embedding(ids[:-1]).tanh()
    loss = vocab_parallel_linear_cross_entropy(x, embedding, ids[1:], EVERYTHING, reduction).sum()
    loss.backward()
    return loss.detach(), parts_of(embedding, groups, lambda p: p.grad)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("size", SIZES, scope="module")
def test_a_tied_weight_has_the_gradients_of_both_its_uses(
    ranks: RankPool, size: int, sequence: bool, reduction: str
) -> None:
    weight = values(VOCABULARY, HIDDEN, kind="normal", seed=1)
    ids = torch.randint(0, VOCABULARY, (25,), generator=torch.Generator().manual_seed(2))
    leaf = weight.clone().requires_grad_()
    expected = dense_losses(leaf[ids[:-1]].tanh() @ leaf.T, ids[1:], EVERYTHING).sum()
    expected.backward()
    results = ranks.run(Layout(tensor=size), through_both_ends, sequence, reduction, weight, ids)
    for rank, (loss, _) in enumerate(results):
        assert_close(loss, expected.detach(), 1e-10, f"loss on rank {rank}")
    assert_close(assemble(parts for _, parts in results)["weight"], leaf.grad, 1e-10, "gradient of the weight")


def evaluate(groups: ProcessGroups, case: Case) -> tuple[Tensor, Tensor, bool]:
    holder, x = build(groups, case)
    with chunks_of(case):
        with torch.no_grad():
            evaluated = loss_of(x, holder, case)
        return evaluated, loss_of(x, holder, case).detach(), evaluated.requires_grad


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("size", [1, 2], scope="module")
def test_without_gradients_the_loss_is_the_same_to_the_bit(ranks: RankPool, size: int, reduction: str) -> None:
    case = Case(12, 21, objective=EVERYTHING, reduction=reduction, chunk=5, compute=torch.float32)
    for rank, (evaluated, trained, differentiable) in enumerate(ranks.run(Layout(tensor=size), evaluate, case)):
        assert torch.equal(evaluated, trained), f"rank {rank}"
        assert not differentiable


def twice(groups: ProcessGroups, case: Case) -> tuple[str, list[Tensor], list[Tensor]]:
    """What the second backward raises, and the gradients after each."""
    holder, x = build(groups, case)
    raised = ""
    with chunks_of(case):
        loss = loss_of(x, holder, case)
        loss.backward(case.scale, retain_graph=True)
        once = [x.grad.clone(), holder.weight.grad.clone()]
        try:
            loss.backward(case.scale)
        except RuntimeError as error:
            raised = str(error)
    return raised, once, [x.grad, holder.weight.grad]


@pytest.mark.parametrize("size", [1, 2], scope="module")
def test_a_second_backward_of_the_sum_is_refused_and_leaves_the_gradients_alone(ranks: RankPool, size: int) -> None:
    for rank, (raised, once, after) in enumerate(ranks.run(Layout(tensor=size), twice, Case(12, 21, chunk=5))):
        assert "modified by an inplace operation" in raised, f"rank {rank}"
        assert torch.equal(after[0], once[0]), f"gradient of x on rank {rank}"
        assert torch.equal(after[1], once[1]), f"gradient of the weight on rank {rank}"


@pytest.mark.parametrize("size", [1, 2], scope="module")
def test_a_second_backward_of_each_loss_adds_the_same_gradients_again(ranks: RankPool, size: int) -> None:
    case = Case(12, 21, reduction="none", chunk=5)
    for rank, (raised, once, after) in enumerate(ranks.run(Layout(tensor=size), twice, case)):
        assert raised == "", f"rank {rank}"
        assert torch.equal(after[0], 2 * once[0]), f"gradient of x on rank {rank}"
        assert torch.equal(after[1], 2 * once[1]), f"gradient of the weight on rank {rank}"


def test_a_loss_that_is_used_twice_has_the_gradients_of_both_uses() -> None:
    case = Case(12, 21)
    gradients = []
    for uses in (1, 2):
        holder, x = build(ProcessGroups.single(), case)
        loss = loss_of(x, holder, case)
        (loss + 2 * loss if uses == 2 else loss).backward()
        gradients.append((x.grad, holder.weight.grad))
    for once, both in zip(*gradients, strict=True):
        assert_close(both, 3 * once, 1e-15, "gradient")


@pytest.mark.parametrize("target", [29, -1])
@pytest.mark.parametrize("size", [1, 2], scope="module")
def test_a_target_outside_the_vocabulary_has_no_plausible_loss(ranks: RankPool, size: int, target: int) -> None:
    for rank, loss in enumerate(ranks.run(Layout(tensor=size), outside, target)):
        assert not loss[1].isfinite(), f"loss {loss[1]:.3f} of a target that is no token, on rank {rank}"
        assert loss[[0, 2]].isfinite().all(), f"rank {rank}"


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("vocabulary", [29, 32])
def test_rows_of_logits_that_are_apart_change_nothing(
    monkeypatch: pytest.MonkeyPatch, vocabulary: int, reduction: str
) -> None:
    """As on a GPU, where they begin at multiples of 16 elements."""
    case = Case(12, vocabulary, objective=EVERYTHING, reduction=reduction, chunk=5)
    found = []
    for row in (1, 16):
        monkeypatch.setitem(linear_cross_entropy._ROW, "cpu", row)
        holder, x = build(ProcessGroups.single(), case)
        with chunks_of(case):
            loss = loss_of(x, holder, case)
            loss.backward(case.scale)
        found.append((loss.detach(), x.grad, holder.weight.grad))
    for apart, dense, what in zip(found[1], found[0], ("loss", "gradient of x", "gradient of the weight"), strict=True):
        assert_close(apart, dense, 1e-14, what)


def outside(groups: ProcessGroups, target: int) -> Tensor:
    holder, x = build(groups, Case(3, 29))
    targets = torch.tensor([1, target, 2])
    return vocab_parallel_linear_cross_entropy(x, holder, targets, reduction="none").detach()


def test_a_reduction_that_is_not_known_is_refused() -> None:
    head = VocabParallelHead(9, 2, ProcessGroups.single())
    with pytest.raises(ValueError, match="reduction='mean' is not known; legal: sum, none"):
        vocab_parallel_linear_cross_entropy(torch.ones(3, 2), head, torch.tensor([1, 2, 3]), reduction="mean")


MEASURE = """
import sys, torch
from argonne.parallel import ProcessGroups, VocabParallelHead
from argonne.parallel import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy, vocab_parallel_logits

def resident(which):  # not getrusage: its peak begins with that of the process that started this one
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(which))

def step(tokens):
    x, targets = torch.randn(tokens, 16, requires_grad=True), torch.randint(0, 151_665, (tokens,))
    if sys.argv[1] == "fused":
        return vocab_parallel_linear_cross_entropy(x, head, targets).backward()
    logits = vocab_parallel_logits(x, head)
    vocab_parallel_cross_entropy(logits, targets, head.range, head.axis).sum().backward()

torch.manual_seed(0)
head = VocabParallelHead(151_665, 16, ProcessGroups.single())
torch.nn.init.normal_(head.weight)
step(2)  # loads what a first call loads
before = resident("VmRSS")
step(1024)
print(resident("VmHWM") - before)
"""


def peak(way: str) -> int:
    """Bytes by which a step in a fresh process is above what it had before."""
    command = [sys.executable, "-c", MEASURE, way]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_at_a_vocabulary_of_151665_the_peak_is_a_quarter_at_most() -> None:
    fused, apart = peak("fused"), peak("apart")
    assert apart > 2 * 1024 * 151_665 * 4, "the logits and their gradient were never there"
    assert 4 * fused < apart, f"{fused / 2**20:.0f} MiB fused, {apart / 2**20:.0f} MiB apart"
