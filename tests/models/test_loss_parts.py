"""Cross-entropy, label smoothing and z-loss apart, of every head and in every layout, are their closed forms."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from argonne.models import (
    Argonne1Config,
    Argonne1Model,
    ArgonneConfig,
    ArgonneModel,
    BaseModel,
    Batch,
    CrossEntropyLoss,
    Execution,
    LossFunction,
)
from argonne.parallel import (
    Layout,
    Objective,
    Precision,
    ProcessGroups,
    initialise,
    sharded_parameters,
    vocab_parallel_logits,
)
from argonne.parallel.communication.reduction import sum_over
from argonne.training.loss_parts import LossParts
from tests.models.own import Small
from tests.pool import RankPool

VOCABULARY, SEQUENCE, MICRO_BATCHES, BLOCKS = 37, 16, 4, 4
OBJECTIVE = Objective(label_smoothing=0.1, z_loss=0.01)
CAP = 1.5


class Capped(Small):
    """Logits are bent below a cap, and so exist: the loss is of those."""

    def _loss(self, micro_batch: Batch, loss: LossFunction) -> Tensor:
        assert isinstance(loss, CrossEntropyLoss)
        logits = vocab_parallel_logits(self(micro_batch), self.head)
        return loss.of_logits(CAP * torch.tanh(logits / CAP), self.head, micro_batch.shard(self.groups.context))


class Twice(Small):
    """Its loss is no sum of what ``CrossEntropyLoss`` gives."""

    def _loss(self, micro_batch: Batch, loss: LossFunction) -> Tensor:
        return 2 * super()._loss(micro_batch, loss)


def model_of(name: str, execution: Execution) -> BaseModel:
    sizes = ArgonneConfig(16, 4, 4, 2, VOCABULARY, 24, SEQUENCE, initializer_range=0.3, tie_word_embeddings=False)
    models = {
        "argonne": lambda: ArgonneModel(sizes, execution),
        "tied": lambda: ArgonneModel(replace(sizes, tie_word_embeddings=True), execution),
        "argonne 1": lambda: Argonne1Model(
            Argonne1Config(24, 4, 6, VOCABULARY, 40, SEQUENCE, 1e-5, "gelu", 0.0, 0.0, 0.0), execution
        ),
        "own": lambda: Small(execution),
        "capped": lambda: Capped(execution),
        "twice": lambda: Twice(execution),
    }
    model = models[name]()
    initialise(sharded_parameters(model, execution.groups), 3)
    return model


def batch_of(is_weighted: bool = True) -> Batch:
    """Some positions count more than others, and some not at all."""
    draw = torch.Generator().manual_seed(8)
    tokens = torch.randint(VOCABULARY, (MICRO_BATCHES, 2, SEQUENCE + 1), generator=draw)
    ids, targets = tokens[..., :-1], tokens[..., 1:].clone()
    targets[0, 1, 3:7] = -100
    weights = torch.rand(ids.shape, generator=draw, dtype=torch.float64) if is_weighted else None
    return Batch(ids, targets, weights=weights, divisor=float(ids.numel()))


def told(
    groups: ProcessGroups, name: str, is_weighted: bool = True, precision: torch.dtype = torch.float64
) -> tuple[dict[str, float], float]:
    """The parts of a step's loss, and that."""
    if precision != torch.float64:
        groups = groups.in_blocks(BLOCKS)
    model = model_of(name, Execution(groups, Precision(precision, precision)))
    whole, count = batch_of(is_weighted), MICRO_BATCHES // groups.data.size
    own = slice(groups.data.rank * count, (groups.data.rank + 1) * count)
    weights = None if whole.weights is None else whole.weights[own]
    parts = LossParts(OBJECTIVE, groups, precision)
    batch = replace(whole, ids=whole.ids[own], targets=whole.targets[own], weights=weights)
    loss = model.forward_backward(batch, CrossEntropyLoss(OBJECTIVE, parts=parts.found))
    total = sum_over(loss, groups.replicas).to(precision).item()
    return parts.take(int(whole.divisor), total), total


@cache
def closed_form(name: str, is_weighted: bool) -> dict[str, float]:
    """Of logits that exist whole, in one process, by the definitions."""
    model, batch = (
        model_of(name, Execution(ProcessGroups.single(), Precision(torch.float64, torch.float64))),
        batch_of(),
    )
    with torch.no_grad():
        hidden = [vocab_parallel_logits(model(part), model.head) for part in batch.micro_batches()]
    logits = torch.cat(hidden)[:, :VOCABULARY]
    logits = CAP * torch.tanh(logits / CAP) if name == "capped" else logits
    targets = batch.targets.flatten()
    assert batch.weights is not None
    counts = (targets != -100) * (batch.weights.flatten() if is_weighted else 1)
    log_sum = logits.exp().sum(1).log()
    at_target = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    parts = {
        "cross_entropy": log_sum - at_target,
        "label_smoothing": 0.1 * (at_target - logits.mean(1)),
        "z_loss": 0.01 * log_sum**2,
    }
    return {part: (value * counts).sum().item() / batch.divisor for part, value in parts.items()}


LAYOUTS = [
    Layout(tensor=2),
    Layout(tensor=2, sequence_parallel=True),
    Layout(pipeline=2),
    Layout(context=2),
    Layout(data=2),
]
CASES = [("argonne", layout) for layout in LAYOUTS]
CASES += [(name, layout) for name in ("tied", "argonne 1") for layout in (LAYOUTS[0], LAYOUTS[2])]
CASES += [(name, layout) for name in ("own", "capped") for layout in (LAYOUTS[0], LAYOUTS[4])]


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("name", ["argonne", "tied", "argonne 1", "own", "capped"])
def test_the_parts_of_a_step_are_their_closed_forms(name: str, is_weighted: bool) -> None:
    found, loss = told(ProcessGroups.single(), name, is_weighted)
    assert found == pytest.approx(closed_form(name, is_weighted), rel=1e-11)
    assert sum(found.values()) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_so_they_are_in_every_layout(ranks: RankPool, name: str, layout: Layout) -> None:
    for found, loss in ranks.run(layout, told, name):
        assert found == pytest.approx(closed_form(name, is_weighted=True), rel=1e-11)
        assert sum(found.values()) == pytest.approx(loss, rel=1e-12)


def test_in_a_reproducible_run_they_are_the_same_bits_in_every_layout(ranks: RankPool) -> None:
    expected = told(ProcessGroups.single(), "argonne", False, torch.float32)
    assert len(expected[0]) == 3
    for layout in (Layout(tensor=2), Layout(pipeline=2), Layout(data=2)):
        for found in ranks.run(layout, told, "argonne", False, torch.float32):
            assert found == expected, layout


def test_of_a_loss_that_is_another_sum_nothing_is_told() -> None:
    found, loss = told(ProcessGroups.single(), "twice")
    assert found == {}
    assert loss == pytest.approx(2 * sum(closed_form("own", is_weighted=True).values()), rel=1e-11)
