"""From each rank's gradients after backward to those of the whole model, and their norm."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.communication.recording import is_checking
from argonne.parallel.communication.reduction import sum_of_two, sum_over
from argonne.parallel.communication.tree import tree_sum
from argonne.parallel.errors import LayoutError
from argonne.parallel.sharding.check import check_gradients
from argonne.parallel.sharding.exact import exact_square_sum
from argonne.parallel.sharding.spec import ShardedParameter


def complete_gradients(parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> None:
    """Add up, in place, what each rank knows only in part: over the replicas, then ``sum_partial_gradients``.

    Over the replicas (data and context) every gradient is a partial sum: the loss is divided by the global
    number of target tokens, so nothing is averaged here. A replica that has not used a parameter (an idle expert)
    counts zeros; only where nothing is summed does a missing gradient stay missing.

    This is for loops without a ``DataParallel``, whose ``complete`` does the same beside backward.

    Raises:
        LayoutError: some of the replicas hold a parameter, and not all of them or one.
    """
    axis = groups.replicas
    for sharded in parameters:
        holders = {region.holders_over(axis).ranks for region in sharded.spec.regions}
        if axis.size == 1 or holders == {(axis.rank,)}:
            continue
        if any(len(ranks) != axis.size for ranks in holders):
            raise LayoutError(f"{sharded.name} is held by replicas {sorted(holders)[0]}; legal: by all of them, or one")
        for parameter in (sharded.parameter, *sharded.aliases):
            if (gradient := _gradient(parameter)) is not None:
                sum_over(gradient, axis)
    sum_partial_gradients(parameters, groups)


def sum_partial_gradients(parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> None:
    """Add up what the ranks of one replica know in part: the gradients that their ``Region`` calls partial over
    the tensor-parallel ranks, and those of parameters that two pipeline stages hold. Before, those of a parameter's
    aliases are added to its own.

    In a block of ``record(check=...)``, then compare them with ``check_gradients``.
    """
    for sharded in parameters:
        _add_aliases(sharded)
    if groups.tensor.size > 1:
        _sum_over_holders(parameters, groups)
    if groups.pipeline.size > 1:
        _sum_over_stages(parameters, groups)
    if is_checking():
        check_gradients(parameters, groups)


def _add_aliases(sharded: ShardedParameter) -> None:
    found = [alias.grad for alias in sharded.aliases if alias.grad is not None]
    if found:
        total, own = tree_sum(found), sharded.parameter.grad
        sharded.parameter.grad = total if own is None else own.add_(total)
    for alias in sharded.aliases:
        alias.grad = None


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    """The gradient of a parameter that is summed: zeros where this rank has not used it; None if it is not trained."""
    if parameter.grad is None and parameter.requires_grad:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)
    return parameter.grad


def _sum_over_holders(parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> None:
    """One all-reduce of the whole tensors that have several holders, each rank adding what it has."""
    shared = [(s, r) for s in parameters for r in s.spec.regions if r.holders_over(groups.tensor).partial]
    if not shared:
        return
    # Where replicas hold different rows, the holders of an element need not be at one place of the data axis.
    rows_are_shared_out = any(len(r.holders_over(groups.replicas).ranks) < groups.replicas.size for _, r in shared)
    axis = groups.stage if rows_are_shared_out else groups.tensor
    gradients = {id(s): _gradient(s.parameter) for s, _ in shared}
    # Every rank has some region of each, so that all lay out the same buffer.
    shapes = {region.name: region.whole_shape for _, region in shared}
    # In the gradients' own dtype: that of a bfloat16 parameter may be float32.
    dtypes = {s.parameter.dtype if s.parameter.grad is None else s.parameter.grad.dtype for s, _ in shared}
    dtype = functools.reduce(torch.promote_types, dtypes)
    sizes = [math.prod(shape) for shape in shapes.values()]
    buffer = torch.zeros(sum(sizes), dtype=dtype, device=groups.device)
    wholes = {name: piece.view(shapes[name]) for name, piece in zip(shapes, buffer.split(sizes), strict=True)}
    for sharded, region in shared:
        gradient = gradients[id(sharded)]
        # Replicas that hold the same rows have the same sum over all replicas already: one of them adds it.
        if gradient is not None and (not rows_are_shared_out or region.is_owner_over(groups.replicas)):
            wholes[region.name][region.whole_index] = region.part_of(gradient)
    sum_over(buffer, axis)
    for sharded, region in shared:
        if (gradient := gradients[id(sharded)]) is not None:
            region.part_of(gradient).copy_(wholes[region.name][region.whole_index])


def _sum_over_stages(parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> None:
    """Each of the two stages that hold a parameter sends the other its part; both add the same two numbers."""
    for sharded in parameters:
        holders = [region.holders_over(groups.pipeline) for region in sharded.spec.regions]
        stages = next((h.ranks for h in holders if h.partial), ())
        gradient = _gradient(sharded.parameter) if stages else None
        if gradient is None:
            continue
        if len(set(stages)) != 2 or any(h.ranks != stages for h in holders):
            raise LayoutError(f"{sharded.name} is held by stages {stages}; legal: the whole parameter by two of them")
        sum_of_two(gradient, groups.pipeline, *stages)


def global_gradient_norm(parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> Tensor:
    """The 2-norm of the whole model's gradient: a float64 scalar, equal on all ranks.

    Each element counts once, on the rank that owns its region. Call when they are complete.
    """
    owned = (
        gradient[region.local_index]
        for sharded in parameters
        if (gradient := sharded.parameter.grad) is not None
        for region in sharded.spec.regions
        if region.is_owner(groups)
    )
    if groups.reproducible:
        return exact_square_sum(owned, groups.world, groups.device).sqrt()
    total = torch.zeros((), dtype=torch.float64, device=groups.device)
    for part in owned:
        total += torch.linalg.vector_norm(part, dtype=torch.float64) ** 2
    return sum_over(total, groups.world).sqrt()


def clip_gradients(parameters: Sequence[ShardedParameter], norm: Tensor, limit: float, loss_scale: float = 1.0) -> None:
    """Scale every gradient so that the global norm is at most ``limit``.

    With a ``loss_scale`` the gradients are that many times too large, and are brought back; ``norm`` is the true one.
    """
    factor = (limit / (norm + 1e-6)).clamp(max=1.0) / loss_scale
    for sharded in parameters:
        if (gradient := sharded.parameter.grad) is not None:
            # A dimension makes its dtype count: it is the product that is rounded to a narrow one, not the factor.
            accurate = factor.to(torch.promote_types(gradient.dtype, torch.float32))
            gradient.mul_(accurate.reshape((1,) * gradient.ndim))
