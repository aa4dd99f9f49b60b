"""What a pipeline says of its loss is what one process says, in whatever dtypes the model is kept and computed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.parallel import Layout, PipelinePlan, Precision, ProcessGroups, initialise
from argonne.parallel.pipeline_parallel.plan import SCHEDULES
from tests.pool import RankPool

CONFIG = ArgonneConfig(16, 5, 4, 2, 53, 24, 16, initializer_range=0.3)
PRECISIONS = [
    Precision(parameters, compute)
    for parameters in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for compute in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
]


def operands() -> tuple[Tensor, Tensor]:
    ids = torch.randint(CONFIG.vocab_size, (4, 3, 17), generator=torch.Generator().manual_seed(11))
    return ids[..., :-1], ids[..., 1:]


def losses(groups: ProcessGroups, schedule: str, kind: str = "replicate") -> list[tuple[Tensor, Tensor]]:
    """For each precision the loss of a training step, and that of an evaluation."""
    ids, targets = operands()
    found = []
    for precision in PRECISIONS:
        plan = PipelinePlan.of(schedule, groups.layout.pipeline)  # type: ignore[arg-type]
        build = partial(ArgonneModel, CONFIG)
        model, replicas = build_replicas(build, Execution(groups, precision, plan=plan), kind)  # type: ignore[arg-type]
        initialise(replicas.parameters, seed=3)
        replicas.publish()
        evaluated = model.evaluate(Batch(ids[0], targets[0]), CrossEntropyLoss())
        replicas.begin(len(ids), deferred=model.defers_weight_gradients)
        trained = model.forward_backward(Batch(ids, targets, divisor=targets.numel()), CrossEntropyLoss())
        found.append((trained, evaluated))
    return found


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> list[tuple[Tensor, Tensor]]:
    return ranks.run(Layout(), losses, "1f1b")[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loss_of_a_pipeline_is_that_of_one_process_to_the_bit(
    ranks: RankPool, alone: list[tuple[Tensor, Tensor]], schedule: str
) -> None:
    for precision, (trained, evaluated) in zip(PRECISIONS, alone, strict=True):
        wide = torch.float64 if precision.compute == torch.float64 else torch.float32
        assert trained.dtype == evaluated.dtype == wide, precision
    for rank, found in enumerate(ranks.run(Layout(pipeline=2), losses, schedule)):
        for precision, wanted, got in zip(PRECISIONS, alone, found, strict=True):
            for one, other in zip(wanted, got, strict=True):
                assert (other.dtype, other.item()) == (one.dtype, one.item()), (rank, precision)
