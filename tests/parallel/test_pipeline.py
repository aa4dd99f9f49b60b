"""A pipeline of any schedule gives the losses and gradients of the chain of its stages run in one piece."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from argonne.parallel import ColumnParallelLinear, Layout, Precision, ProcessGroups, RowParallelLinear, initialise
from argonne.parallel.communication.collectives import all_reduce
from argonne.parallel.pipeline_parallel.plan import SCHEDULES, PipelinePlan
from argonne.parallel.pipeline_parallel.schedule import Pipeline
from argonne.parallel.pipeline_parallel.stages import Activation, broadcast_from_last_stage, pipeline_forward
from argonne.parallel.sharding.spec import sharded_parameters
from argonne.parallel.tensor_parallel.deferral import deferring
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close, parts_of

HIDDEN, BATCH = 6, 3
DOUBLE = Precision(torch.float64, torch.float64)


class Stage(nn.Module):
    """Two parallel layers with biases and a plain norm: what is deferred, and what is not."""

    def __init__(self, groups: ProcessGroups, number: int) -> None:
        super().__init__()
        name = f"stage{number}"
        self.add_module(name, nn.ModuleList())
        self.norm = nn.LayerNorm(HIDDEN, dtype=torch.float64)
        self.up = ColumnParallelLinear(HIDDEN, 8, groups, bias=True, precision=DOUBLE)
        self.down = RowParallelLinear(8, HIDDEN, groups, bias=True, precision=DOUBLE)
        initialise(sharded_parameters(self, groups), seed=number)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def squares(x: Tensor, targets: Tensor) -> Tensor:
    return (x - targets).square().sum()


def operands(micro_batches: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (micro_batches * BATCH, HIDDEN)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore


def run(
    groups: ProcessGroups, plan: PipelinePlan, micro_batches: int, steps: int
) -> tuple[list[Tensor], dict[int, Parts], Tensor, float]:
    """The loss of each step, the last gradients by stage, the output without gradients, and the bubble."""
    stages = {number: Stage(groups, number) for number in plan.held(groups.pipeline.rank)}
    activation = Activation((BATCH, HIDDEN), torch.float64)
    axis = groups.pipeline
    pipeline = Pipeline(stages, plan, axis, activation, activation, micro_batches, groups.device)
    inputs, targets = operands(micro_batches)
    losses = []
    for _ in range(steps):
        for stage in stages.values():
            stage.zero_grad()
        loss = pipeline.forward_backward(inputs, targets, squares)
        losses.append(broadcast_from_last_stage(loss, torch.zeros((), dtype=torch.float64), plan, axis))
        assert pipeline.has_last == (loss is not None)
    gradients = {n: parts_of(stage, groups, lambda parameter: parameter.grad) for n, stage in stages.items()}
    output = pipeline_forward(stages, plan, axis, inputs[:BATCH], activation)
    like = torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
    return losses, gradients, broadcast_from_last_stage(output, like, plan, axis), pipeline.bubble([1.0] * plan.stages)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("layout", "micro_batches"), [(Layout(pipeline=2), 4), (Layout(pipeline=3, tensor=1), 6)])
def test_losses_and_gradients_equal_the_chain(
    ranks: RankPool, schedule: str, layout: Layout, micro_batches: int
) -> None:
    compare(ranks, schedule, layout, micro_batches)


@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
def test_with_tensor_parallel_stages(ranks: RankPool, schedule: str) -> None:
    compare(ranks, schedule, Layout(pipeline=2, tensor=2), 2)


@pytest.mark.parametrize("schedule", ["gpipe", "zb"])
def test_with_fewer_micro_batches_than_ranks(ranks: RankPool, schedule: str) -> None:
    compare(ranks, schedule, Layout(pipeline=2), 1)


def compare(ranks: RankPool, schedule: str, layout: Layout, micro_batches: int) -> None:
    plan = PipelinePlan.of(schedule, layout.pipeline)  # type: ignore[arg-type]
    results = ranks.run(layout, run, plan, micro_batches, 2)

    groups = ProcessGroups.single()
    chain = [Stage(groups, number) for number in range(plan.stages)]
    inputs, targets = operands(micro_batches)
    x = inputs
    for stage in chain:
        x = stage(x)
    expected = squares(x, targets)
    expected.backward()
    for losses, _, output, _ in results:
        for loss in losses:
            assert_close(loss, expected.detach(), 1e-12, f"{schedule}: loss")
        assert_close(output, x[:BATCH].detach(), 1e-12, f"{schedule}: output")
    for number, stage in enumerate(chain):
        found = assemble(gradients[number] for _, gradients, _, _ in results if number in gradients)
        for region, value in parts_of(stage, groups, lambda parameter: parameter.grad):
            assert_close(found[region.name], value, 1e-11, f"{schedule}: stage {number} {region.name}")


def test_bubbles_in_the_order_of_the_papers(ranks: RankPool) -> None:
    """Of equal stages: interleaving divides the bubble of 1F1B by the stages a rank has, zero bubble ends it."""
    size, micro_batches = 2, 4
    found = {}
    for schedule in SCHEDULES:
        plan = PipelinePlan.of(schedule, size)  # type: ignore[arg-type]
        found[schedule] = ranks.run(Layout(pipeline=size), run, plan, micro_batches, 1)[0][3]
    assert found["gpipe"] == found["1f1b"] == pytest.approx(1 / (micro_batches + 1))
    assert found["interleaved"] == pytest.approx(0.5 / (micro_batches + 0.5))
    assert 0 <= found["zb"] < found["interleaved"]


@pytest.mark.parametrize("layer", ["column", "row"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_deferred_weight_gradient_comes_when_it_is_asked_for(layer: str, recompute: bool) -> None:
    groups = ProcessGroups.single()
    kind = ColumnParallelLinear if layer == "column" else RowParallelLinear
    module = kind(HIDDEN, 8, groups, bias=True, precision=DOUBLE)
    initialise(sharded_parameters(module, groups), seed=1)
    x = operands(1)[0].requires_grad_()
    module(x).square().sum().backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    assert x.grad is not None
    input_gradient, x.grad = x.grad, None
    module.zero_grad()

    queue: list = []
    with deferring(queue):
        y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False) if recompute else module(x)
        y.square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, input_gradient)
    assert all(p.grad is None for p in module.parameters()), "a weight gradient did not wait"
    for work in queue:
        work()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name  # type: ignore[arg-type]


def test_what_is_added_over_the_pipeline_is_the_last_stages(ranks: RankPool) -> None:
    assert ranks.run(Layout(pipeline=2), _rank_of_last) == [1.0, 1.0]


def _rank_of_last(groups: ProcessGroups) -> float:
    value = torch.tensor(float(groups.pipeline.rank)) if groups.pipeline.rank == 1 else None
    plan = PipelinePlan(2)
    assert all_reduce(torch.ones(()), groups.pipeline) == 2
    return broadcast_from_last_stage(value, torch.zeros(()), plan, groups.pipeline).item()
