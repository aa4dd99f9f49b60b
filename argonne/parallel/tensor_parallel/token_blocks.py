"""Vectors that every token is computed with (norms' weights, biases), whose gradients are sums over tokens.

Where tensor-parallel ranks share out the tokens, such a sum is cut over them; so it is always made of as many blocks of
tokens as the axis has blocks of features, added as one aligned tree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.tree import tree_sum
from argonne.parallel.errors import ArgonneError


class _ForTokenBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vector: Tensor, blocks: int) -> Tensor:
        return vector.expand(blocks, 1, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return tree_sum([part.clone() for part in gradient[:, 0]]), None


def token_blocks(axis: Axis, sequence_parallel: bool) -> int | None:
    """How many blocks of tokens this rank has of each tensor that it is given; None where sums are not cut (fast)."""
    if axis.blocks is None:
        return None
    return axis.own_blocks if sequence_parallel else axis.blocks


def in_token_blocks(x: Tensor, vector: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """``[..., width]`` and ``[width]`` -> ``[blocks, tokens of a block, width]`` and ``[blocks, 1, width]``.

    The gradient of ``vector`` is then the tree over the blocks.

    Raises:
        ArgonneError: the tokens are not so many equal blocks.
    """
    rows = x.numel() // x.shape[-1]
    if rows % blocks:
        raise ArgonneError(f"{rows} tokens are not {blocks} equal blocks of a reproducible sum; legal: a multiple")
    return x.reshape(blocks, rows // blocks, x.shape[-1]), _ForTokenBlocks.apply(vector, blocks)


def add_bias(y: Tensor, bias: Tensor, blocks: int | None) -> Tensor:
    """``y + bias`` of ``[..., width]`` and ``[width]``, with the bias's gradient by token blocks if there are such."""
    if blocks is None or not (torch.is_grad_enabled() and bias.requires_grad):
        return y + bias
    rows, wide = in_token_blocks(y, bias, blocks)
    return (rows + wide).view(y.shape)
