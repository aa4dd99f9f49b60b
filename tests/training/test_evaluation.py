"""The loss on held-out text is that of one process, however the sequences fall to the replicas."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from argonne.models import ArgonneConfig, ArgonneModel, CrossEntropyLoss, Execution, build_replicas
from argonne.parallel import Layout, PipelinePlan, Precision, ProcessGroups, initialise
from argonne.training.evaluation import held_out_loss
from tests.pool import RankPool

CONFIG = ArgonneConfig(16, 5, 4, 2, 53, 24, 16, initializer_range=0.3)
DOUBLE = Precision(torch.float64, torch.float64)
MICRO_BATCH, BLOCK = 2, 16
COUNTS = (1, 2, 5, 7)


def held_out(count: int) -> Tensor:
    """``[2, count, block + 1]``: ids, and the numbers of their documents."""
    draw = torch.Generator().manual_seed(count)
    ids = torch.randint(CONFIG.vocab_size, (count, BLOCK + 1), generator=draw)
    return torch.stack([ids, torch.randint(2, ids.shape, generator=draw).cumsum(1)])


def losses(groups: ProcessGroups, kind: str, schedule: str) -> list[float]:
    plan = PipelinePlan.of(schedule, groups.layout.pipeline)  # type: ignore[arg-type]
    build = partial(ArgonneModel, CONFIG, plan=plan)
    model, replicas = build_replicas(build, Execution(groups, DOUBLE), kind)  # type: ignore[arg-type]
    initialise(replicas.parameters, seed=3)
    replicas.publish()
    return [
        held_out_loss(model, held_out(count), MICRO_BATCH, CrossEntropyLoss(), mask)
        for count in COUNTS
        for mask in (False, True)
    ]


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> list[float]:
    return ranks.run(Layout(), losses, "replicate", "1f1b")[0]


@pytest.mark.parametrize("kind", ["replicate", "zero1", "fsdp"])
@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        (Layout(data=2), "1f1b"),
        (Layout(data=3), "1f1b"),
        (Layout(data=2, pipeline=2), "interleaved"),
        (Layout(data=3, pipeline=2), "1f1b"),
        (Layout(data=2, context=2), "1f1b"),
        (Layout(data=3, context=2), "1f1b"),
        (Layout(data=3, tensor=2), "1f1b"),
    ],
    ids=str,
)
def test_held_out_loss_equals_that_of_one_process_where_replicas_have_unequal_shares(
    ranks: RankPool, alone: list[float], layout: Layout, schedule: str, kind: str
) -> None:
    for rank, found in enumerate(ranks.run(layout, losses, kind, schedule)):
        assert found == pytest.approx(alone, rel=1e-12), f"rank {rank}"
