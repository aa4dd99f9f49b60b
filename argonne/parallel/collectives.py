"""The conjugate region functions: each collective is one autograd Function whose backward is its dual.

In the notation of Megatron-LM (arXiv 1909.08053, figure 3): ``copy_to_region`` is *f* and
``reduce_from_region`` is *g*. Over an axis of one process every function returns its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from argonne.parallel.errors import ArgonneError
from argonne.parallel.groups import Axis

T = TypeVar("T")

# torch 2.13 renames the two tensor collectives and warns of the old names; 2.11 has the old ones only.
_all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce ``tensor`` over ``axis`` in place, and return it. Not differentiable."""
    if axis.group is not None:
        dist.all_reduce(tensor, op=op, group=axis.group)
    return tensor


def all_gather(tensor: Tensor, axis: Axis) -> Tensor:
    """Every rank's ``tensor`` (equal shapes), stacked: ``[axis.size, *tensor.shape]``. Not differentiable."""
    if axis.group is None:
        return tensor.unsqueeze(0)
    gathered = tensor.new_empty((axis.size * tensor.numel(),))
    _all_gather_tensor(gathered, tensor.contiguous().view(-1), group=axis.group)
    return gathered.view(axis.size, *tensor.shape)


def reduce_scatter(tensor: Tensor, axis: Axis) -> Tensor:
    """The sum over ``axis`` of part ``axis.rank`` of ``tensor``, cut along dimension 0. Not differentiable."""
    if axis.group is None:
        return tensor
    part = tensor.new_empty((tensor.shape[0] // axis.size, *tensor.shape[1:]))
    _reduce_scatter_tensor(part, tensor.contiguous(), group=axis.group)
    return part


def broadcast(tensor: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """Overwrite ``tensor`` with that of rank ``source`` of ``axis``, and return it. Not differentiable."""
    if axis.group is not None:
        dist.broadcast(tensor, src=axis.ranks[source], group=axis.group)
    return tensor


def gather_objects(value: T, axis: Axis) -> list[T]:
    """Every rank's small Python ``value``, in rank order. For set-up and saves, not for training steps."""
    if axis.group is None:
        return [value]
    gathered: list[Any] = [None] * axis.size
    dist.all_gather_object(gathered, value, group=axis.group)
    return gathered


def collectively(action: Callable[[], T], axis: Axis) -> T:
    """Run ``action`` on every rank; if it is refused on any, raise an ``ArgonneError`` of it on all of them.

    So that a fault which one rank alone can see (a file, say) leaves no other waiting.
    """
    problem = None
    try:
        result = action()
    except (ArgonneError, OSError) as error:
        problem = str(error)
    for found in gather_objects(problem, axis):
        if found is not None:
            raise ArgonneError(found)
    return result


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_reduce(gradient.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        return all_reduce(tensor.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class _GatherFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return torch.cat(all_gather(tensor, axis).unbind(0), dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.chunk(ctx.axis.size, dim=-1)[ctx.axis.rank].contiguous(), None


class _ScatterToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.chunk(axis.size, dim=-1)[axis.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.cat(all_gather(gradient, ctx.axis).unbind(0), dim=-1), None


def copy_to_region(tensor: Tensor, axis: Axis) -> Tensor:
    """Enter a parallel region: the identity forward, the sum of the ranks' gradients backward (*f*)."""
    return tensor if axis.group is None else _CopyToRegion.apply(tensor, axis)


def reduce_from_region(tensor: Tensor, axis: Axis) -> Tensor:
    """Leave a parallel region: the sum of the ranks' partial results forward, the identity backward (*g*)."""
    return tensor if axis.group is None else _ReduceFromRegion.apply(tensor, axis)


def gather_from_region(tensor: Tensor, axis: Axis) -> Tensor:
    """Join equal parts of the last dimension forward; take this rank's part of the gradient backward."""
    return tensor if axis.group is None else _GatherFromRegion.apply(tensor, axis)


def scatter_to_region(tensor: Tensor, axis: Axis) -> Tensor:
    """Take this rank's equal part of the last dimension forward; join the parts' gradients backward."""
    return tensor if axis.group is None else _ScatterToRegion.apply(tensor, axis)
