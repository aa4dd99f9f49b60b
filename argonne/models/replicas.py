"""A model and its replicas, built as the kind of data parallelism asks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from argonne.models.contract import LanguageModel, require_contract
from argonne.models.execution import Execution
from argonne.parallel import ArgonneError, DataParallel, ShardedParameter, data_parallel
from argonne.parallel.data_parallel.kinds import Kind
from argonne.parallel.sharding.spec import with_block_matrices


def build_replicas(
    build: Callable[[Execution], LanguageModel], execution: Execution, kind: Kind, shard: int | None = None
) -> tuple[LanguageModel, DataParallel]:
    """A model on the device of its groups and its replicas; its parameters are empty until something fills them.

    Under ``fsdp`` a process allocates its share, and besides one block at a time, or what lies outside them; all of a
    model that makes values of its own (parameters without an initialiser, buffers).

    Raises:
        ArgonneError: the model does not meet the contract, or the kind does not suit it.
    """
    groups = execution.groups
    shares = kind == "fsdp" and groups.replicas.size > 1
    with torch.device("meta") if shares else groups.device:
        model = build(execution)
    require_contract(model)
    model.check_layout(groups.layout)
    if shares and _has_values_of_its_own(model):
        with groups.device:
            model = build(execution)
    return model, replicas_of(model, execution, kind, shard)


def _has_values_of_its_own(model: LanguageModel) -> bool:
    """Whether something that is on ``meta`` is filled by nobody else: no initialiser of ours, and no checkpoint."""
    assert isinstance(model, torch.nn.Module)
    parameters = any(sharded.spec.initialiser is None for sharded in model.sharded_parameters())
    return parameters or any(buffer.is_meta for buffer in model.buffers())


def parameters_of(model: LanguageModel) -> list[ShardedParameter]:
    """This rank's parameters of ``model``, which know whether they are matrices of its blocks."""
    return with_block_matrices(model.sharded_parameters(), model.blocks)


def replicas_of(model: LanguageModel, execution: Execution, kind: Kind, shard: int | None = None) -> DataParallel:
    """Keep the replicas of ``model`` at one model; see ``data_parallel``.

    Raises:
        ArgonneError: the kind does not suit the model.
    """
    assert isinstance(model, torch.nn.Module)
    if model.defers_weight_gradients:
        check_kind(kind, "zb")
    return data_parallel(
        model,
        model.groups,
        kind,
        precision=execution.precision,
        parameters=parameters_of(model),
        blocks=model.blocks,
        stages=list(model.stages.values()),
        shard=shard,
    )


def check_kind(kind: Kind, schedule: str) -> None:
    """Raise ``ArgonneError`` unless a pipeline of that schedule can have replicas of that kind."""
    if kind == "fsdp" and schedule == "zb":
        raise ArgonneError(
            "fsdp=True does not go with pipeline_schedule='zb', whose weight gradients come when FSDP no longer waits "
            "for them; legal: 1f1b, interleaved or gpipe, or zero1 in place of fsdp"
        )
