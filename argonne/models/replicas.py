"""The replicas of an Argonne model, as one of the kinds of data parallelism."""

from __future__ import annotations

from typing import Any

import torch

from argonne.kernels import Backend
from argonne.models.argonne import ArgonneModel
from argonne.models.config import ArgonneConfig
from argonne.models.pipelined import PipelinedModel, build_model
from argonne.parallel import (
    ArgonneError,
    DataParallel,
    PipelinePlan,
    Precision,
    ProcessGroups,
    data_parallel,
)
from argonne.parallel.data_parallel.kinds import Kind


def replicas_of(
    model: ArgonneModel | PipelinedModel, kind: Kind, precision: Precision, shard: int | None = None
) -> DataParallel:
    """Keep the replicas of ``model`` at one model; see ``data_parallel``.

    Raises:
        ArgonneError: the kind does not suit the pipeline's schedule.
    """
    common: dict[str, Any] = {"precision": precision, "parameters": model.sharded_parameters(), "shard": shard}
    if isinstance(model, ArgonneModel):
        methods = ("loss", "next_token_logits")
        return data_parallel(model, model.groups, kind, blocks=model.model.layers, forward_methods=methods, **common)
    check_kind(kind, model.plan.schedule)
    stages = list(model.held.values())
    blocks = [block for stage in stages for block in stage.model.layers]
    return data_parallel(model, model.groups, kind, blocks=blocks, stages=stages, **common)


def build_replicas(
    config: ArgonneConfig,
    groups: ProcessGroups,
    precision: Precision,
    plan: PipelinePlan,
    kind: Kind,
    backend: Backend = "auto",
    shard: int | None = None,
) -> tuple[ArgonneModel | PipelinedModel, DataParallel]:
    """A model on the device of ``groups`` and its replicas; its parameters are empty until something fills them.

    Under ``fsdp`` a process allocates its share, and besides one block at a time, or what lies outside them.
    """
    shares = kind == "fsdp" and groups.replicas.size > 1
    with torch.device("meta") if shares else groups.device:
        model = build_model(config, groups, precision, plan, backend)
    return model, replicas_of(model, kind, precision, shard)


def check_kind(kind: Kind, schedule: str) -> None:
    """Raise ``ArgonneError`` unless a pipeline of that schedule can have replicas of that kind."""
    if kind == "fsdp" and schedule == "zb":
        raise ArgonneError(
            "fsdp=True does not go with pipeline_schedule='zb', whose weight gradients come when FSDP no longer waits "
            "for them; legal: 1f1b, interleaved or gpipe, or zero1 in place of fsdp"
        )
