"""What is minimised is an argument: weights of positions, and losses of one's own, at every kind of layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from argonne.models import (
    ArgonneConfig,
    ArgonneModel,
    Batch,
    CrossEntropyLoss,
    Execution,
    Head,
    LossFunction,
    build_replicas,
)
from argonne.parallel import (
    Layout,
    PipelinePlan,
    Precision,
    ProcessGroups,
    check_gradients,
    gather_from_sequence_region,
    global_gradient_norm,
    reduce_from_region,
    vocab_parallel_logits,
)
from argonne.parallel.communication.reduction import sum_over
from argonne.training.optimizer import build_optimizer
from argonne.training.step import Learner, train_step
from tests.pool import RankPool

DOUBLE = Precision(torch.float64, torch.float64)
VOCABULARY, SEQUENCE, GLOBAL_BATCH = 29, 16, 8
CONFIG = ArgonneConfig(16, 4, 4, 2, VOCABULARY, 24, SEQUENCE, initializer_range=0.3, tie_word_embeddings=False)


@dataclass(frozen=True)
class SquaredLogits:
    """The sum of all squared logits beside the cross-entropy: a loss that sees every token of the vocabulary."""

    groups: ProcessGroups

    def __call__(self, hidden: Tensor, head: Head, batch: Batch) -> Tensor:
        squares = vocab_parallel_logits(hidden, head).square().sum()  # of this rank's tokens; padding has none
        return CrossEntropyLoss()(hidden, head, batch) + 0.01 * reduce_from_region(squares, self.groups.tensor)


def loss_of(name: str, groups: ProcessGroups) -> LossFunction:
    return SquaredLogits(groups) if name == "squared" else CrossEntropyLoss()


def whole_batch(name: str) -> Batch:
    draw = torch.Generator().manual_seed(8)
    tokens = torch.randint(VOCABULARY, (GLOBAL_BATCH, SEQUENCE + 1), generator=draw)
    weights = torch.rand((GLOBAL_BATCH, SEQUENCE), generator=draw) if name == "weights" else None
    return Batch(tokens[:, :-1], tokens[:, 1:], weights=weights, divisor=GLOBAL_BATCH * SEQUENCE)


def model_of(groups: ProcessGroups, schedule: Any, kind: Any) -> Learner:
    plan = PipelinePlan.of(schedule, groups.pipeline.size)
    model, replicas = build_replicas(partial(ArgonneModel, CONFIG), Execution(groups, DOUBLE, plan=plan), kind)
    learner = Learner(model=model, replicas=replicas, optimizer=build_optimizer(replicas.parameters, 0.1))
    learner.initialise(seed=3)
    return learner


def mine(groups: ProcessGroups, name: str) -> Batch:
    """This replica's sequences, in micro-batches of two."""
    whole, own = whole_batch(name), slice(groups.data.rank, None, groups.data.size)
    ids, targets = (x[own].unflatten(0, (-1, 2)) for x in (whole.ids, whole.targets))
    weights = None if whole.weights is None else whole.weights[own].unflatten(0, (-1, 2))
    return replace(whole, ids=ids, targets=targets, weights=weights)


def work(groups: ProcessGroups, name: str, schedule: str, kind: str) -> list[float]:
    """The summed loss of an evaluation, then loss and gradient norm of three steps."""
    learner, loss, batch = model_of(groups, schedule, kind), loss_of(name, groups), mine(groups, name)
    parts = [learner.model.evaluate(part, loss) for part in batch.micro_batches()]
    found = [sum_over(torch.stack(parts).sum(), groups.replicas).item()]
    learner.replicas.publish()
    for step in range(3):
        if step == 0:
            learner.replicas.begin(len(batch.ids), deferred=learner.model.defers_weight_gradients)
            learner.model.forward_backward(batch, loss)
            learner.replicas.complete()
            check_gradients(learner.parameters, groups)
            found.append(global_gradient_norm(learner.parameters, groups).item())
        result = train_step(learner, batch, loss, 1e-2, gradient_clip=1.0)
        assert result.norm is not None
        found += [result.loss, result.norm]
    return found


@cache
def plain(name: str) -> list[float]:
    """The evaluation, and loss and norm of the first step, of logits that exist whole."""
    learner, batch = model_of(ProcessGroups.single(), "1f1b", "replicate"), whole_batch(name)
    model = learner.model
    assert isinstance(model, ArgonneModel)
    logits = model.logits(batch.ids)
    losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view(batch.targets.shape)
    total = losses.sum() if batch.weights is None else (losses * batch.weights).sum()
    if name == "squared":
        total = total + 0.01 * logits[..., :VOCABULARY].square().sum()
    (total / batch.divisor).backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    return [total.item(), norm.item(), (total / batch.divisor).item(), norm.item()]


@cache
def alone(name: str) -> list[float]:
    return work(ProcessGroups.single(), name, "1f1b", "replicate")


@pytest.mark.parametrize("name", ["weights", "squared"])
def test_one_process_equals_the_loss_of_whole_logits(name: str) -> None:
    assert alone(name)[:4] == pytest.approx(plain(name), rel=1e-10)
    assert plain(name)[0] != pytest.approx(plain("plain")[0], rel=1e-2)


CASES = [
    (Layout(tensor=2), "1f1b", "replicate"),
    (Layout(pipeline=2), "1f1b", "replicate"),
    (Layout(pipeline=2), "zb", "replicate"),
    (Layout(pipeline=2, tensor=2), "1f1b", "replicate"),
    (Layout(pipeline=2, tensor=2, sequence_parallel=True), "1f1b", "replicate"),
    (Layout(pipeline=2, data=2), "gpipe", "fsdp"),
    (Layout(context=2), "1f1b", "zero1"),
]


@pytest.mark.parametrize("name", ["weights", "squared"])
@pytest.mark.parametrize(("layout", "schedule", "kind"), CASES, ids=lambda value: str(value))
def test_every_layout_equals_one_process(ranks: RankPool, layout: Layout, schedule: str, kind: str, name: str) -> None:
    for found in ranks.run(layout, work, name, schedule, kind):
        assert found == pytest.approx(alone(name), rel=1e-9)


def whole_rows(groups: ProcessGroups) -> tuple[int, list[float]]:
    """Under sequence parallelism a loss of one's own gathers the rows, as its docstring says it gets a share."""
    learner, batch = model_of(groups, "1f1b", "replicate"), mine(groups, "plain")
    rows = 0

    def loss(hidden: Tensor, head: Head, part: Batch) -> Tensor:
        nonlocal rows
        rows = len(hidden)
        hidden = gather_from_sequence_region(hidden, groups.tensor) if groups.sequence_parallel else hidden
        # Every rank goes on in the same way from whole rows: what each says of them is a part.
        return hidden.square().sum() / groups.tensor.size

    total = learner.model.forward_backward(batch, loss)
    return rows, [total.item() * groups.tensor.size]


def test_a_loss_is_given_a_share_of_the_rows_under_sequence_parallelism(ranks: RankPool) -> None:
    (all_rows, expected), layout = whole_rows(ProcessGroups.single()), Layout(tensor=2, sequence_parallel=True)
    for rows, total in ranks.run(layout, whole_rows):
        assert (rows, total) == (all_rows // 2, pytest.approx(expected, rel=1e-12))
