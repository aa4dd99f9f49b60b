"""Whatever is recomputed, in whatever layout: losses and gradients are, to the bit, those of keeping everything."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from argonne.models import (
    Argonne1Config,
    Argonne1Model,
    ArgonneModel,
    Batch,
    CrossEntropyLoss,
    Execution,
    build_replicas,
)
from argonne.models.families import decoder_family
from argonne.models.recompute import Recompute
from argonne.parallel import Draws, Layout, PipelinePlan, ProcessGroups
from argonne.parallel.tensor_parallel.precision import PRECISIONS
from argonne.training.optimizer import build_optimizer
from argonne.training.step import Learner
from tests.models.closed_form import RECOMPUTATIONS, tiny
from tests.pool import RankPool

MICRO_BATCHES, SEQUENCE = 4, 8
LLAMA = tiny(num_hidden_layers=4, hidden_size=12)
QWEN3 = replace(LLAMA, **decoder_family("qwen3").features(True))
ARGONNE1 = Argonne1Config(12, 4, 4, 30, intermediate_size=20, max_position_embeddings=SEQUENCE)


def computed(
    groups: ProcessGroups, config: Any, precision: str, kind: str, schedule: str, recompute: Recompute
) -> tuple[float, list[Tensor]]:
    """The loss of a step and this rank's gradients, complete."""
    torch.set_num_threads(1)
    plan = PipelinePlan.of(schedule, groups.pipeline.size)  # type: ignore[arg-type]
    execution = Execution(groups, PRECISIONS[precision], plan=plan, recompute=recompute)
    model_of: Any = Argonne1Model if isinstance(config, Argonne1Config) else ArgonneModel
    model, replicas = build_replicas(partial(model_of, config), execution, kind)  # type: ignore[arg-type]
    learner = Learner(model=model, replicas=replicas, optimizer=build_optimizer(replicas.parameters, 0.1))
    learner.initialise(5)
    ids = torch.randint(30, (MICRO_BATCHES, 2, SEQUENCE + 1), generator=torch.Generator().manual_seed(groups.data.rank))
    documents = (ids[..., :-1] % 5 == 0).long().cumsum(-1) if model_of is ArgonneModel else None
    draws = Draws(1, 2, torch.arange(2 * MICRO_BATCHES).view(MICRO_BATCHES, 2))
    batch = Batch(ids[..., :-1], ids[..., 1:], documents, divisor=50.0, draws=draws)
    replicas.begin(MICRO_BATCHES, deferred=model.defers_weight_gradients)
    loss = model.forward_backward(batch, CrossEntropyLoss())
    replicas.complete()
    gradients = [s.parameter.grad for s in replicas.parameters]
    return float(loss), [gradient for gradient in gradients if gradient is not None]


def differing(groups: ProcessGroups, *run: Any) -> list[str]:
    """The choices whose loss or gradients are not those of keeping everything."""
    expected = computed(groups, *run, Recompute.NONE)
    assert expected[1]
    found = {str(choice): computed(groups, *run, choice) for choice in RECOMPUTATIONS}
    return [
        choice
        for choice, (loss, gradients) in found.items()
        if loss != expected[0] or not all(map(torch.equal, gradients, expected[1]))
    ]


CASES = [
    (Layout(), QWEN3, "bf16", "replicate", "1f1b"),
    (Layout(tensor=2, sequence_parallel=True), QWEN3, "bf16", "replicate", "1f1b"),
    (Layout(pipeline=2), LLAMA, "fp32", "replicate", "zb"),
    (Layout(context=2), LLAMA, "fp32", "zero1", "1f1b"),
    (Layout(data=2), LLAMA, "bf16", "fsdp", "1f1b"),
    (Layout(tensor=2), ARGONNE1, "bf16", "replicate", "1f1b"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(map(str, (case[0], *case[2:]))))
def test_every_choice_has_the_bits_of_keeping_everything(ranks: RankPool, case: tuple[Layout, Any]) -> None:
    layout, *run = case
    assert ranks.run(layout, differing, *run) == [[]] * layout.world_size
