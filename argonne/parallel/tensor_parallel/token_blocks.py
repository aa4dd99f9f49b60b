"""Vectors that every token is computed with (norms' weights, biases), whose gradients are sums over tokens.

Where tensor-parallel ranks share out the tokens, such a sum is cut over them. So in a reproducible run it is always
made of as many blocks of tokens as the tensor axis has blocks of features. Each block is a use of the vector apart
(``sharding/uses.py``), whose gradient is summed on its own over micro-batches and replicas; the blocks are added up
last, those of other ranks after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.errors import ArgonneError
from argonne.parallel.sharding.uses import Uses


def uses_by_token_blocks(groups: ProcessGroups) -> Uses | None:
    """Of a vector: one for each block of the tokens that this rank computes with. None in fast mode."""
    axis = groups.tensor
    if axis.blocks is None:
        return None
    return Uses(axis.own_blocks if groups.sequence_parallel else axis.blocks)


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
    """``x * weight`` of ``[..., width]`` and ``[width]``, or of a weight once for each of as many token blocks."""
    return x * weights[0] if len(weights) == 1 else _Scale.apply(x, *weights)


def add_bias(y: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """``y + bias`` of ``[..., width]`` and ``[width]``, or of a bias once for each of as many token blocks."""
    return y + biases[0] if len(biases) == 1 else _AddBias.apply(y, *biases)


def _sums_of_blocks(x: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Each block of tokens on its own: a sum of other rows is made in another way."""
    return [block.sum(0) if any(needed) else None for block in in_token_blocks(x, len(needed))]
