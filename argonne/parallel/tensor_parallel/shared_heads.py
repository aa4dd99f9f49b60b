"""Key-value heads that several canonical blocks of query heads share, in a reproducible run.

Each block has a copy of its head in attention. What the blocks make of the gradient of a head is added up, as a tree,
before it meets the projection: the rank that has the first of the head's blocks has the sum. Where there are more ranks
than heads the others have zeros, which add nothing to the gradient of the weight, and leave the head out of that of the
input (``blocks.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from argonne.parallel.communication.collectives import all_gather
from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.recording import site
from argonne.parallel.communication.tree import tree_sum


class _CopyHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, axis: Axis, blocks_of_head: int, dim: int) -> Tensor:
        ctx.axis, ctx.blocks_of_head, ctx.dim, ctx.site = axis, blocks_of_head, dim, site()
        return heads.repeat_interleave(min(blocks_of_head, axis.own_blocks), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        axis, own = ctx.axis, min(ctx.blocks_of_head, ctx.axis.own_blocks)
        copies = gradient.unflatten(ctx.dim, (-1, own)).unbind(ctx.dim + 1)
        total = tree_sum([copy.clone(memory_format=torch.contiguous_format) for copy in copies])
        ranks = ctx.blocks_of_head // own
        if ranks > 1:
            leaves, first = all_gather(total, axis, ctx.site), axis.rank // ranks * ranks
            own_leaves = leaves[first : first + ranks].unbind(0)
            total = tree_sum(own_leaves) if axis.rank == first else torch.zeros_like(total)
        return total, None, None, None


def copy_heads(heads: Tensor, axis: Axis, blocks_of_head: int, dim: int) -> Tensor:
    """A copy of its key-value head for each canonical block of this rank.

    Args:
        heads: the heads that this rank has, along ``dim``: those of its blocks.
        axis: of canonical blocks; each has query heads of one key-value head.
        blocks_of_head: canonical blocks that share a head, a power of two or all of them.
        dim: the dimension of the heads.

    Returns:
        ``axis.own_blocks`` heads along ``dim``. The gradient of a head is the sum over all its blocks on the rank that
        has the first of them, and zeros elsewhere.
    """
    if blocks_of_head == 1:
        return heads
    copied: Tensor = _CopyHeads.apply(heads, axis, blocks_of_head, dim)
    return copied
