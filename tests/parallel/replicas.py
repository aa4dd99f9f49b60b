"""Training a small model whose rows replicas cannot share out evenly, and comparing it with one process."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from argonne.checkpoint import MOMENTS
from argonne.models import ArgonneConfig, ArgonneModel, Execution
from argonne.models.recompute import Recompute
from argonne.parallel import (
    DataParallel,
    Layout,
    Precision,
    ProcessGroups,
    clip_gradients,
    data_parallel,
    global_gradient_norm,
    initialise,
    regions_of,
)
from argonne.parallel.communication.collectives import all_reduce
from argonne.training.optimizer import build_optimizer, set_learning_rate
from tests.losses import summed_loss
from tests.parallel.operands import values
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close

KINDS = ["replicate", "zero1", "fsdp"]
DOUBLE = Precision(torch.float64, torch.float64)
# Rows that 2 and 4 replicas cannot share out evenly: 7 of the norms, 10 and 20 of the fused projection.
CONFIG = ArgonneConfig(
    hidden_size=7,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=29,
    intermediate_size=10,
    max_position_embeddings=16,
)
SEQUENCES, LENGTH, STEPS = 12, 6, 3
SMALL = 2000  # bytes: several buckets even of this model


@dataclass(frozen=True)
class Plan:
    """One training run; the batch of a step is the same whatever the layout."""

    kind: str = "replicate"
    config: ArgonneConfig = CONFIG
    accumulation: int = 1
    recompute: Recompute = Recompute.NONE
    precision: Precision = DOUBLE
    bucket_bytes: int = SMALL
    shard: int | None = None


@dataclass
class Outcome:
    """What a rank saw of a run."""

    losses: list[float]
    norms: list[float]
    tensors: list[tuple[str, Parts]]
    """Weights and moments."""
    spoken: Parts
    """A one for each element of the weights that this rank owns."""
    logits: list[Tensor]
    """Of an evaluation before, and one after the training."""


def build(groups: ProcessGroups, plan: Plan) -> tuple[ArgonneModel, DataParallel]:
    """A model that begins at values away from any symmetry, set through ``strategy.parameters``."""
    model = ArgonneModel(plan.config, Execution(groups, plan.precision, recompute=plan.recompute))
    strategy = data_parallel(
        model,
        groups,
        plan.kind,
        precision=plan.precision,
        blocks=model.blocks,
        forward_methods=("next_token_logits",),
        shard=plan.shard,
        bucket_bytes=plan.bucket_bytes,
    )
    initialise(strategy.parameters, seed=3)
    for region, part in regions_of(strategy.parameters):
        noise = values(*region.whole_shape, kind="normal", seed=sum(map(ord, region.name)))
        part.mul_(1.5).add_(0.1 * noise[region.whole_index])
    strategy.publish()
    return model, strategy


def batches(groups: ProcessGroups, accumulation: int, step: int) -> list[Tensor]:
    """This replica's micro-batches of a step."""
    ids = torch.randint(0, 29, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return list(ids.chunk(groups.replicas.size)[groups.replicas.rank].chunk(accumulation))


def backward(model: ArgonneModel, batch: Tensor) -> Tensor:
    loss = summed_loss(model, batch[:, :-1], batch[:, 1:]) / (SEQUENCES * LENGTH)
    loss.backward()
    return loss.detach()


def evaluate(model: ArgonneModel) -> Tensor:
    return model.next_token_logits(torch.tensor([[1, 5, 2, 8], [3, 3, 7, 0]]))


def train(groups: ProcessGroups, plan: Plan) -> Outcome:
    model, strategy = build(groups, plan)
    optimizer = build_optimizer(strategy.parameters, weight_decay=0.1)
    losses, norms, logits = [], [], [evaluate(model)]
    for step in range(STEPS):
        strategy.begin(plan.accumulation)
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches(groups, plan.accumulation, step):
            total += backward(model, batch)
        strategy.complete()
        norm = global_gradient_norm(strategy.parameters, groups)
        clip_gradients(strategy.parameters, norm, 0.5)
        set_learning_rate(optimizer, 1e-2)
        optimizer.step()
        optimizer.zero_grad()
        strategy.publish()
        losses.append(all_reduce(total, groups.replicas).item())
        norms.append(norm.item())
    logits.append(evaluate(model))
    tensors = [("weight", [(r, part.clone()) for r, part in regions_of(strategy.parameters)])]
    for moment in MOMENTS:
        held = [
            (region, optimizer.state[sharded.parameter][moment][region.local_index])
            for sharded in strategy.parameters
            for region in sharded.spec.regions
        ]
        tensors.append((moment, held))
    spoken = [(r, torch.ones(r.shape)) for s in strategy.parameters for r in s.spec.regions if r.is_owner(groups)]
    return Outcome(losses, norms, tensors, spoken, logits)


@functools.cache
def alone(config: ArgonneConfig) -> Outcome:
    """The same run in one process, without accumulation."""
    return train(ProcessGroups.single(), Plan(config=config))


def assert_equals_one_process(ranks: RankPool, layout: Layout, plan: Plan) -> None:
    results = ranks.run(layout, train, plan)
    expected = alone(plan.config)
    for rank, found in enumerate(results):
        assert found.losses == pytest.approx(expected.losses, rel=1e-10), f"losses of rank {rank}"
        assert found.norms == pytest.approx(expected.norms, rel=1e-10), f"gradient norms of rank {rank}"
        assert found.norms[0] > 0.5, "nothing is clipped"
        for logits, of_one in zip(found.logits, expected.logits, strict=True):
            assert_close(logits, of_one, 1e-9, f"logits of rank {rank}")
    for place, (what, parts) in enumerate(expected.tensors):
        of_one = assemble([parts])
        found = assemble(result.tensors[place][1] for result in results)
        assert set(found) == set(of_one)
        largest = max(whole.norm().item() for whole in of_one.values())
        for name, whole in of_one.items():
            assert_close(found[name], whole, 1e-9, f"{what} of {name}", scale=1e-3 * largest)
    counts: dict[str, Tensor] = {}
    for result in results:
        for region, ones in result.spoken:
            count = counts.setdefault(region.name, torch.zeros(region.whole_shape))
            count[region.whole_index] += ones
    for name, count in counts.items():
        assert (count == 1).all(), f"elements of {name} are spoken for {count.unique().tolist()} times"
    assert set(counts) == set(assemble([expected.tensors[0][1]]))


TIED = replace(CONFIG, tie_word_embeddings=True)
SHARED_HEAD = replace(CONFIG, num_key_value_heads=1)


class Used(nn.Module):
    """Parameters whose gradients are the values that they are multiplied with."""

    def __init__(self, shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(
            values(*shape, kind="integers", seed=i).to(dtype) for i, (shape, dtype) in enumerate(shapes)
        )

    def forward(self, factors: list[Tensor | None]) -> Tensor:
        used = [(p * f).sum().double() for p, f in zip(self.parts, factors, strict=True) if f is not None]
        return torch.stack(used).sum()
