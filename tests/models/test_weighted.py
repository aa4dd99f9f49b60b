"""A step whose targets do not all count: loss and every gradient are those of a formula in float64, at every layout.

The loss is divided by the weight of the global batch, whichever ranks and micro-batches have it: some have none.
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from argonne.data import Assignment, BatchStream, DataPosition, LaneState
from argonne.data.lanes.packing import Packed
from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.parallel import Layout, PipelinePlan, Precision, ProcessGroups, initialise
from argonne.parallel.communication.reduction import sum_over
from argonne.training.feed import BatchFeed
from tests import dense
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close, parts_of

DOUBLE = Precision(torch.float64, torch.float64)
BLOCK, SAMPLES, VOCABULARY = 12, 16, 23
CONFIG = ArgonneConfig(16, 2, 4, 2, VOCABULARY, 24, BLOCK, initializer_range=0.4, tie_word_embeddings=False)


def sample(number: int) -> Packed:
    """Of every four samples the first counts whole and the others not at all, but for one token of sample 1."""
    draw = np.random.default_rng(number)
    weights = np.full(BLOCK + 1, int(number % 4 == 0), dtype=np.int32)
    weights[5] |= number == 1
    documents = np.repeat([0, 1, 2], [4, 6, BLOCK - 9]).astype(np.int32)
    return Packed(draw.integers(VOCABULARY, size=BLOCK + 1), documents, weights)


class Samples:
    """One lane of them."""

    block_size, lanes, served = BLOCK, 1, (0,)

    def __init__(self) -> None:
        self.number = -1

    def next_sequence(self, lane: int) -> Packed:
        self.number += 1
        return sample(self.number)

    def state(self, lane: int) -> LaneState:
        return LaneState(DataPosition(0, 0, 0, self.number))


def importance(tokens: Tensor) -> Tensor:
    """A weight of each target that is no whole number."""
    return 0.25 + (tokens % 5).double() / 3


def step(groups: ProcessGroups, accumulation: int, fractions: bool) -> tuple[float, Parts]:
    """Loss and gradients of the step of all samples, through the feed; with ``fractions`` by ``Batch.weights``."""
    plan, data = PipelinePlan.of("1f1b", groups.pipeline.size), groups.data
    model, replicas = build_replicas(partial(ArgonneModel, CONFIG), Execution(groups, DOUBLE, plan=plan), "replicate")
    initialise(replicas.parameters, 4)
    replicas.publish()
    micro_batch = SAMPLES // (accumulation * data.size)
    stream = BatchStream(Samples(), Assignment(micro_batch, accumulation, data.size), data.rank)
    shape = (accumulation, micro_batch, BLOCK + 1)
    feed = BatchFeed(stream if groups.model.rank == 0 else None, shape, groups, documents=True, weights=True)
    fed = feed.next()
    feed.close()
    assert fed.weights is not None
    assert fed.documents is not None
    assert fed.weight == 4 * BLOCK + 1
    targets, weights, divisor = fed.targets(-100), None, float(fed.weight)
    if fractions:
        targets = fed.tokens[..., 1:]
        weights = fed.weights[..., 1:] * importance(targets)
        divisor = sum_over(weights.sum(), data).item()
    batch = Batch(fed.tokens[..., :-1], targets, fed.documents[..., :-1], weights, divisor)
    replicas.begin(accumulation, deferred=model.defers_weight_gradients)
    loss = model.forward_backward(batch, CrossEntropyLoss())
    replicas.complete()
    return sum_over(loss, groups.replicas).item(), parts_of(model, groups, lambda parameter: parameter.grad)


@cache
def formula(fractions: bool) -> tuple[float, dict[str, Tensor]]:
    """The same of a dense model, whose loss is the weighted mean over all targets."""
    single = ProcessGroups.single()
    model = ArgonneModel(CONFIG, Execution(single, DOUBLE))
    model.initialise(seed=4)
    whole = assemble([parts_of(model, single, lambda parameter: parameter)])
    for weight in whole.values():
        weight.requires_grad_()
    samples = [sample(number) for number in range(SAMPLES)]
    tokens, documents = (
        torch.from_numpy(np.stack([getattr(each, name) for each in samples])) for name in ("tokens", "documents")
    )
    weights = torch.from_numpy(np.stack([s.weights for s in samples if s.weights is not None]))[:, 1:].double()
    weights = weights * importance(tokens[:, 1:]) if fractions else weights
    scores = dense.logits(whole, CONFIG, tokens[:, :-1], documents[:, :-1])
    losses = F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(weights.shape)
    loss = (weights * losses).sum() / weights.sum()
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in whole.items() if weight.grad is not None}


CASES = [
    (Layout(), 1, False),
    (Layout(), 4, False),
    (Layout(data=2), 1, False),
    (Layout(data=2), 4, True),
    (Layout(data=4), 1, True),
    (Layout(data=4), 4, False),
    (Layout(context=2), 1, False),
    (Layout(context=2, data=2), 4, True),
    (Layout(pipeline=2), 4, False),
    (Layout(pipeline=2, tensor=2, sequence_parallel=True), 4, True),
]


@pytest.mark.parametrize(("layout", "accumulation", "fractions"), CASES, ids=str)
def test_the_weighted_loss_and_each_gradient_are_those_of_the_formula(
    ranks: RankPool, layout: Layout, accumulation: int, fractions: bool
) -> None:
    loss, gradients = formula(fractions)
    results = ranks.run(layout, step, accumulation, fractions)
    assert [found for found, _ in results] == pytest.approx([loss] * layout.world_size, rel=1e-12)
    whole = assemble(parts for _, parts in results)
    assert whole.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert_close(whole[name], expected, 1e-11, name)
