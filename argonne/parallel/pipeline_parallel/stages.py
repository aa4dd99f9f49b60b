"""What pipeline stages hand to each other, and a pass through all of them without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from argonne.parallel.communication.collectives import broadcast, transfer
from argonne.parallel.communication.groups import Axis
from argonne.parallel.pipeline_parallel.plan import PipelinePlan


@dataclass(frozen=True)
class Activation:
    """What a stage hands to the next for one micro-batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@torch.no_grad()
def pipeline_forward(
    stages: Mapping[int, nn.Module],
    plan: PipelinePlan,
    axis: Axis,
    inputs: Tensor,
    activation: Activation,
    **options: Any,
) -> Tensor | None:
    """One batch through every stage, without gradients: the last stage's output on its rank, elsewhere None.

    Every stage is given the ``options`` too.
    """
    x: Tensor | None = None
    for stage in range(plan.stages):
        here = plan.rank_of(stage) == axis.rank
        if stage > 0 and (before := plan.rank_of(stage - 1)) != (after := plan.rank_of(stage)):
            if axis.rank == before:
                assert x is not None
                transfer(x, axis, before, after)
            elif here:
                x = torch.empty(activation.shape, dtype=activation.dtype, device=inputs.device)
                transfer(x, axis, before, after)
        if here:
            x = stages[stage](inputs if stage == 0 else x, **options)
    return x if plan.rank_of(plan.stages - 1) == axis.rank else None


def broadcast_from_last_stage(value: Tensor | None, like: Tensor, plan: PipelinePlan, axis: Axis) -> Tensor:
    """What the rank of the last stage has, on every rank of the pipeline; ``like`` has its shape and dtype."""
    if value is None:
        value = torch.empty_like(like, memory_format=torch.contiguous_format)
    assert (value.shape, value.dtype) == (like.shape, like.dtype), f"{value.dtype} would become {like.dtype}"
    return broadcast(value.contiguous(), axis, plan.rank_of(plan.stages - 1))
