"""Vectors that every token is computed with (norms' weights, biases), whose gradients are sums over tokens.

Where tensor-parallel ranks share out the tokens, such a sum is cut over them. So in a reproducible run it is always
made of as many blocks of tokens as the tensor axis has blocks of features. Each block has an alias of the vector, a
parameter of the same memory, whose gradient is summed on its own over micro-batches and replicas; the blocks come last
(``ShardedParameter.aliases``), those of other ranks after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.errors import ArgonneError


def token_aliases(vector: nn.Parameter, groups: ProcessGroups) -> tuple[nn.Parameter, ...]:
    """An alias of ``vector`` for each block of the tokens that this rank computes with; none in fast mode."""
    axis = groups.tensor
    if axis.blocks is None:
        return ()
    count = axis.own_blocks if groups.sequence_parallel else axis.blocks
    return tuple(nn.Parameter(vector.data, requires_grad=vector.requires_grad) for _ in range(count))


def in_token_blocks(x: Tensor, blocks: int) -> Tensor:
    """``[..., width]`` -> ``[blocks, tokens of a block, width]``.

    Raises:
        ArgonneError: the tokens are not so many equal blocks.
    """
    rows = x.numel() // x.shape[-1]
    if rows % blocks:
        raise ArgonneError(f"{rows} tokens are not {blocks} equal blocks of a reproducible sum; legal: a multiple")
    return x.reshape(blocks, rows // blocks, x.shape[-1])


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights[0])
        ctx.blocks = len(weights)
        return x * weights[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        of_x = gradient * weight if ctx.needs_input_grad[0] else None
        return of_x, *_sums_of_blocks(gradient * x, ctx.needs_input_grad[1:])


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *biases: Tensor) -> Tensor:
        return y + biases[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *_sums_of_blocks(gradient, ctx.needs_input_grad[1:])


def scale_tokens(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``x * weight`` of ``[..., width]`` and ``[width]``, or the aliases of a weight for as many token blocks."""
    return x * weights[0] if len(weights) == 1 else _Scale.apply(x, *weights)


def add_bias(y: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """``y + bias`` of ``[..., width]`` and ``[width]``, or the aliases of a bias for as many token blocks."""
    return y + biases[0] if len(biases) == 1 else _AddBias.apply(y, *biases)


def _sums_of_blocks(x: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Each block of tokens on its own: a sum of other rows is made in another way."""
    return [block.sum(0) if any(needed) else None for block in in_token_blocks(x, len(needed))]
