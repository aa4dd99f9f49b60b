"""The kinds of data parallelism, and the choice of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import nn

from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.communication.layout import divisors
from argonne.parallel.data_parallel.buckets import BUCKET_BYTES
from argonne.parallel.data_parallel.replicate import Replicate
from argonne.parallel.data_parallel.strategy import DataParallel
from argonne.parallel.data_parallel.zero import ShardedOptimizer
from argonne.parallel.errors import ArgonneError
from argonne.parallel.sharding.check import check_declarations
from argonne.parallel.sharding.spec import ShardedParameter, sharded_parameters
from argonne.parallel.tensor_parallel.precision import Precision
from argonne.parallel.tensor_parallel.working_copy import KeepsWorkingCopy

Kind = Literal["replicate", "zero1", "fsdp"]


def data_parallel(
    model: nn.Module,
    groups: ProcessGroups,
    kind: Kind = "replicate",
    *,
    precision: Precision = Precision(),
    parameters: Sequence[ShardedParameter] | None = None,
    blocks: Iterable[nn.Module] = (),
    forward_methods: Sequence[str] = (),
    stages: Sequence[nn.Module] = (),
    shard: int | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> DataParallel:
    """Keep the replicas of ``model`` (data and context parallel) at one model.

    Args:
        model: this rank's part of it, on its device. Afterwards use ``.parameters`` of what is returned in place
            of the model's own.
        kind: what the replicas share out. ``replicate``: nothing but the batch. ``zero1``: the optimizer's state
            (arXiv 1910.02054). ``fsdp``: parameters, gradients and the optimizer's state, by PyTorch's FSDP2.
            Without replicas all are the same.
        parameters: those of the model, where ``sharded_parameters(model, groups)`` is not what they are.
        blocks: for ``fsdp``: the modules whose parameters are gathered together, just before each is used.
        forward_methods: for ``fsdp``: the model's methods that compute, besides ``forward``.
        stages: for ``fsdp``: the parts of the model that a pipeline's schedule runs.
        shard: for ``fsdp``: share out over groups of so many neighbouring replicas, which are replicas of each other
            (hybrid sharding); over all of them when left out.
        bucket_bytes: the most bytes of gradient in one all-reduce or reduce-scatter of ours (``fsdp``: over groups).

    Raises:
        ArgonneError: the kind is unknown, or does not suit the model, or ``shard`` the replicas.
        LayoutError: the declarations of the ranks do not fit together (``check_declarations``).
    """
    if kind not in get_args(Kind):
        raise ArgonneError(f"data parallel kind={kind!r} is not known; legal: {', '.join(get_args(Kind))}")
    check_shard(kind, shard, groups.replicas.size)
    _check_reproducible(groups, precision, shard)
    parameters = sharded_parameters(model, groups) if parameters is None else parameters
    check_declarations(parameters, groups, values=False)  # they may be empty still
    if kind == "fsdp" and groups.replicas.size > 1:
        from argonne.parallel.data_parallel.fully_shard import FullyShard  # importing FSDP takes a moment

        return FullyShard(model, groups, precision, parameters, blocks, forward_methods, stages, shard, bucket_bytes)
    # In all other kinds each replica computes with parameters of its own.
    if groups.replicas.size == 1:
        strategy = DataParallel(parameters, groups)
    else:
        if precision.accumulate_in_product:
            # The products would widen a gradient only if there were none; a bucket has its place ready.
            for sharded in parameters:
                sharded.parameter.grad_dtype = torch.promote_types(sharded.parameter.dtype, torch.float32)
        strategy = (ShardedOptimizer if kind == "zero1" else Replicate)(parameters, groups, bucket_bytes)
    strategy.copies = [module for module in model.modules() if isinstance(module, KeepsWorkingCopy)]
    return strategy


def _check_reproducible(groups: ProcessGroups, precision: Precision, shard: int | None) -> None:
    """Refuse what a reproducible run cannot sum in its order."""
    if not groups.reproducible:
        return
    if precision.accumulate_in_product:
        raise ArgonneError(
            "accumulate_in_product=True conflicts with a reproducible run, whose micro-batches are summed as a tree; "
            "legal: False"
        )
    if shard is not None and shard != groups.replicas.size:
        raise ArgonneError(
            f"fsdp_shard={shard} conflicts with a reproducible run, whose replicas are one tree; legal: leave it out"
        )


def check_shard(kind: Kind, shard: int | None, replicas: int) -> None:
    """Raise ``ArgonneError`` unless ``kind`` can share out over groups of ``shard`` of so many replicas."""
    if shard is None:
        return
    if kind != "fsdp":
        raise ArgonneError(f"fsdp_shard={shard} has no meaning for kind={kind!r}; legal: with fsdp, or left out")
    if shard < 2 or replicas % shard:
        legal = ", ".join(str(size) for size in divisors(replicas) if size > 1) or "none, as there is one replica"
        raise ArgonneError(
            f"fsdp_shard={shard} does not cut the {replicas} data- and context-parallel processes into groups of two "
            f"or more; legal sizes: {legal}"
        )
