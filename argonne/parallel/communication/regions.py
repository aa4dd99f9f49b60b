"""The conjugate region functions: each collective is one autograd Function whose backward is its dual.

In the notation of Megatron-LM (arXiv 1909.08053, figure 3) ``copy_to_region`` is *f* and
``reduce_from_region`` is *g*; with sequence parallelism (arXiv 2205.05198, figure 5) their places are taken by
``gather_from_sequence_region`` and ``reduce_scatter_to_sequence_region``, which share out dimension 0.
Over an axis of one process every function returns its input; none ever writes to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from argonne.parallel.communication.collectives import all_gather, require_equal_parts
from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.recording import site
from argonne.parallel.communication.reduction import sum_and_scatter, sum_over
from argonne.parallel.errors import ArgonneError


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.site = axis, site()
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return sum_over(_copy(gradient), ctx.axis, ctx.site), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        return sum_over(_copy(tensor), axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class _GatherFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, dim: int, sizes: Sequence[int] | None) -> Tensor:
        ctx.axis, ctx.dim, ctx.sizes = axis, dim, sizes
        return _join(tensor, axis, dim) if sizes is None else _join_unequal(tensor, axis, dim, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        axis, dim, sizes = ctx.axis, ctx.dim, ctx.sizes
        if sizes is None:
            return _own_part(gradient, axis, dim), None, None, None
        own = gradient.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank])
        return own.contiguous(), None, None, None


class _ScatterToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim, ctx.site = axis, dim, site()
        return _own_part(tensor, axis, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _join(gradient, ctx.axis, ctx.dim, ctx.site), None, None


class _GatherFromSequenceRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.site = axis, site()
        return _join(tensor, axis, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return sum_and_scatter(gradient, ctx.axis, ctx.site), None


class _ReduceScatterToSequenceRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.site = axis, site()
        _require_dimension(tensor, 0)
        return sum_and_scatter(tensor, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _join(gradient, ctx.axis, 0, ctx.site), None


def copy_to_region(tensor: Tensor, axis: Axis) -> Tensor:
    """Enter a parallel region: the identity forward, the sum of the ranks' gradients backward (*f*)."""
    return tensor if axis.group is None else _CopyToRegion.apply(tensor, axis)


def reduce_from_region(tensor: Tensor, axis: Axis) -> Tensor:
    """Leave a parallel region: the sum of the ranks' partial results forward, the identity backward (*g*)."""
    if axis.group is None:
        return tensor
    return _ReduceFromRegion.apply(tensor, axis) if torch.is_grad_enabled() else sum_over(_copy(tensor), axis)


def gather_from_region(tensor: Tensor, axis: Axis, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
    """Join the ranks' parts of a dimension forward; take this rank's part of the gradient backward.

    For results that every rank goes on to use in the same way.

    Args:
        sizes: of every rank's part, where they are unequal; what is sent is then as large as the largest from each.

    Raises:
        ArgonneError: ``sizes`` are not those of the ranks.
    """
    if sizes is not None and (len(sizes) != axis.size or tensor.shape[dim] != sizes[axis.rank]):
        raise ArgonneError(
            f"sizes={list(sizes)} are not those of the parts over {axis.name}: rank {axis.rank} of {axis.size} has "
            f"{tensor.shape[dim]}; legal: the size of every rank's part"
        )
    return tensor if axis.group is None else _GatherFromRegion.apply(tensor, axis, dim, sizes)


def scatter_to_region(tensor: Tensor, axis: Axis, dim: int = -1) -> Tensor:
    """Take this rank's equal part of a dimension forward; join the parts' gradients backward.

    With ``dim=0`` this is how a tensor that every rank has enters sequence parallelism.

    Raises:
        ArgonneError: the dimension cannot be cut into equal parts.
    """
    return tensor if axis.group is None else _ScatterToRegion.apply(tensor, axis, dim)


def gather_from_sequence_region(tensor: Tensor, axis: Axis) -> Tensor:
    """Enter a tensor-parallel region from a sequence-parallel one: ``[tokens / ranks, ...]`` -> ``[tokens, ...]``.

    All-gather forward, reduce-scatter backward: each rank uses the tokens in its own way.
    """
    return tensor if axis.group is None else _GatherFromSequenceRegion.apply(tensor, axis)


def reduce_scatter_to_sequence_region(tensor: Tensor, axis: Axis) -> Tensor:
    """Leave a tensor-parallel region for a sequence-parallel one: ``[tokens, ...]`` -> ``[tokens / ranks, ...]``.

    Reduce-scatter of the ranks' partial results forward, all-gather backward.

    Raises:
        ArgonneError: the tokens cannot be shared out in equal parts.
    """
    return tensor if axis.group is None else _ReduceScatterToSequenceRegion.apply(tensor, axis)


def _copy(tensor: Tensor) -> Tensor:
    """The sum is made in place, on memory that is nobody else's."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _join(tensor: Tensor, axis: Axis, dim: int, site: str | None = None) -> Tensor:
    _require_dimension(tensor, dim)
    parts = all_gather(tensor, axis, site)
    return parts.flatten(0, 1) if dim == 0 else torch.cat(parts.unbind(0), dim=dim)


def _join_unequal(tensor: Tensor, axis: Axis, dim: int, sizes: Sequence[int]) -> Tensor:
    """A collective takes equal parts, so that each is sent as large as the largest."""
    shape = list(tensor.shape)
    shape[dim] = max(sizes)
    sent = tensor.new_zeros(shape)
    sent.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = all_gather(sent, axis).unbind(0)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim=dim)


def _require_dimension(tensor: Tensor, dim: int) -> None:
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ArgonneError(f"{list(tensor.shape)} has no dimension {dim} to share out; legal: a tensor that has it")


def _own_part(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    _require_dimension(tensor, dim)
    require_equal_parts(tensor, axis, dim)
    return tensor.chunk(axis.size, dim=dim)[axis.rank].contiguous()
