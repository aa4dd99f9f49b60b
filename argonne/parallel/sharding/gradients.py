"""From each rank's gradients after backward to those of the whole model, and their norm."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.communication.reduction import sum_of_two, sum_over
from argonne.parallel.sharding.spec import ShardedParameter


def complete_gradients(parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> None:
    """Add up, in place, what each rank knows only in part: over the replicas, then ``sum_partial_gradients``.

    Over the replicas (data and context) every gradient is a partial sum: the loss is divided by the global
    number of target tokens, so nothing is averaged here.
    """
    for sharded in parameters:
        if sharded.parameter.grad is not None:
            sum_over(sharded.parameter.grad, groups.replicas)
    sum_partial_gradients(parameters, groups)


def sum_partial_gradients(parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> None:
    """Add up what the ranks of one replica know in part: the gradients that their ``Region`` calls partial over
    the tensor-parallel ranks, and those of parameters that two pipeline stages hold.
    """
    if groups.tensor.size > 1:
        _sum_over_holders(parameters, groups)
    if groups.pipeline.size > 1:
        _sum_over_stages(parameters, groups)


def _sum_over_holders(parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> None:
    """One all-reduce of the whole tensors that have several holders, each rank adding what it has."""
    shared = [(s, r) for s in parameters for r in s.spec.regions if r.partial_gradient]
    if not shared:
        return
    # Where replicas hold different rows, the holders of an element need not be at one place of the data axis.
    rows_are_shared_out = any(r.replicas for _, r in shared)
    axis = groups.stage if rows_are_shared_out else groups.tensor
    # Every rank has some region of each, so that all lay out the same buffer.
    shapes = {region.name: region.whole_shape for _, region in shared}
    # In the gradients' own dtype: that of a bfloat16 parameter may be float32.
    dtypes = {s.parameter.dtype if s.parameter.grad is None else s.parameter.grad.dtype for s, _ in shared}
    dtype = functools.reduce(torch.promote_types, dtypes)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    buffer = torch.zeros(count, dtype=dtype, device=groups.device)
    pieces = buffer.split([torch.Size(shape).numel() for shape in shapes.values()])
    wholes = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
    for sharded, region in shared:
        # Replicas that hold the same rows have the same sum over all replicas already: one of them adds it.
        if sharded.parameter.grad is not None and (not rows_are_shared_out or region.speaks_for_replicas(groups)):
            wholes[region.name][region.whole_index] = sharded.parameter.grad[region.local_index]
    sum_over(buffer, axis)
    for sharded, region in shared:
        if sharded.parameter.grad is not None:
            sharded.parameter.grad[region.local_index] = wholes[region.name][region.whole_index]


def _sum_over_stages(parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> None:
    """Each of the two stages that hold a parameter sends the other its part; both add the same two numbers."""
    for sharded in parameters:
        if not any(region.stages for region in sharded.spec.regions):
            continue
        gradient = sharded.parameter.grad
        assert gradient is not None, f"{sharded.name} is held by two stages but used by one only"
        sum_of_two(gradient, groups.pipeline, *sharded.spec.regions[0].stages)


def global_gradient_norm(parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> Tensor:
    """The 2-norm of the whole model's gradient: a float64 scalar, equal on all ranks.

    Each element counts once, on the rank that speaks for its region. Call after ``complete_gradients``.
    """
    total = torch.zeros((), dtype=torch.float64, device=groups.device)
    for sharded in parameters:
        gradient = sharded.parameter.grad
        if gradient is None:
            continue
        for region in sharded.spec.regions:
            if region.speaks(groups):
                total += torch.linalg.vector_norm(gradient[region.local_index], dtype=torch.float64) ** 2
    return sum_over(total, groups.world).sqrt()


def clip_gradients(parameters: Sequence[ShardedParameter], norm: Tensor, limit: float, loss_scale: float = 1.0) -> None:
    """Scale every gradient so that the global norm is at most ``limit``.

    With a ``loss_scale`` the gradients are that many times too large, and are brought back; ``norm`` is the true one.
    """
    factor = (limit / (norm + 1e-6)).clamp(max=1.0) / loss_scale
    for sharded in parameters:
        gradient = sharded.parameter.grad
        if gradient is not None:
            # A dimension makes its dtype count: it is the product that is rounded to a narrow one, not the factor.
            accurate = factor.to(torch.promote_types(gradient.dtype, torch.float32))
            gradient.mul_(accurate.reshape((1,) * gradient.ndim))
