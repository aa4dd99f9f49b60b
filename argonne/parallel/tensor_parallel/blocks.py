"""Matrix products cut into canonical blocks, so that no bit of them depends on how many ranks share them out.

Features that are shared out are a fixed number of blocks along the whole axis (``Axis.blocks``), of which a rank has
some in a row. What is added up over them is added block by block, as one aligned tree (arXiv 2511.17826 does so for
inference); what is only laid side by side is computed block by block, or at once where that is seen to give the same
bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.isolation import is_isolated
from argonne.parallel.communication.tree import tree_sum
from argonne.parallel.errors import LayoutError
from argonne.parallel.sharding.partition import Partition
from argonne.parallel.tensor_parallel.gemm import product, suits_onednn, transposed_product

Block = tuple[range, ...]
"""The local features of one canonical block: a run of each tensor that is fused."""


def cut_parts(parts: Sequence[Partition], axis: Axis) -> tuple[Block, ...]:
    """This rank's canonical blocks of fused parts, in the features that it has of them; none in fast mode.

    Heads that several blocks share (``Partition.first_has_gradient``) belong to the first of these.

    Raises:
        LayoutError: the blocks of a part are not the axis's, or a rank does not hold its own in their order.
    """
    if axis.blocks is None:
        return ()
    cuts, begin = [], 0
    for part in parts:
        cuts.append(list(_shared_runs(part, axis) if part.first_has_gradient else _runs(part, axis)))
        cuts[-1] = [range(begin + run.start, begin + run.stop) for run in cuts[-1]]
        begin += part.local_features(axis.rank)
    return tuple(zip(*cuts, strict=True))


def _runs(part: Partition, axis: Axis) -> Iterator[range]:
    """The features of each canonical block, counted from the rank's first."""
    assert axis.blocks is not None
    if part.features % axis.blocks or not (part.is_even and part.is_in_order):
        raise LayoutError(
            f"{part.name or 'features'} of {part.features} over {axis.size} ranks is not shared out in "
            f"{axis.blocks} equal blocks, as a reproducible run asks; legal: a multiple, in the order of the ranks"
        )
    size = part.features // axis.blocks
    return (range(block * size, (block + 1) * size) for block in range(axis.own_blocks))


def _shared_runs(part: Partition, axis: Axis) -> Iterator[range]:
    """The same where each head is shared by several blocks: an empty run for all but the first of these."""
    assert axis.blocks is not None
    sharing, held = axis.blocks * part.block // part.features, part.held[axis.rank]
    for block in range(axis.rank * axis.own_blocks, (axis.rank + 1) * axis.own_blocks):
        begin = (block // sharing - held.start) * part.block
        yield range(begin, begin + part.block if block % sharing == 0 else begin)


def heads_of_others(parts: Sequence[Partition], axis: Axis) -> Block:
    """This rank's features that are in none of its blocks: of shared heads whose first block another rank has."""
    found, begin = [], 0
    for part in parts:
        width = part.local_features(axis.rank)
        if axis.blocks is not None and part.first_has_gradient:
            sharing = axis.blocks * part.block // part.features
            if axis.rank * axis.own_blocks % sharing:
                found.append(range(begin, begin + width))
        begin += width
    return tuple(found)


def take(x: Tensor, dim: int, block: Block) -> Tensor:
    """The features of a block along ``dim``, contiguous: what a product's bits might depend on is always the same."""
    runs = [x.narrow(dim, run.start, len(run)) for run in block if len(run)]
    return runs[0].contiguous() if len(runs) == 1 else torch.cat(runs, dim)


@dataclass(frozen=True)
class Cut:
    """How the features of a weight ``[out, in]`` are cut into canonical blocks: one side of it, or none (fast mode)."""

    inputs: tuple[Block, ...] = ()
    outputs: tuple[Block, ...] = ()
    apart: Block = ()
    """Outputs that are in no block of this rank: the gradient of them is zero here (``heads_of_others``)."""

    def __bool__(self) -> bool:
        return bool(self.inputs or self.outputs)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight^T + bias``."""
        if not self:
            return product(x, weight, bias)
        y = _summed(x, weight, self.inputs) if self.inputs else _columns(x, weight, self._all_outputs)
        return y if bias is None else y.add_(bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """``gradient @ weight``."""
        if self.outputs:
            return _summed_over_rows(gradient, weight, self.outputs)
        return _columns(gradient, weight.t(), self.inputs) if self.inputs else product(gradient, weight.t())

    def weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """``gradient^T @ x`` of matrices."""
        if self.outputs:
            return _rows(gradient, x, self._all_outputs)
        return _columns(gradient.t(), x.t(), self.inputs) if self.inputs else transposed_product(gradient, x)

    def bias_gradient(self, gradient: Tensor) -> Tensor:
        """The sum of the rows of a matrix."""
        if not self.outputs:
            return gradient.sum(0)
        out = gradient.new_empty(gradient.shape[1])
        for run in (run for block in self._all_outputs for run in block if len(run)):
            # On its own: in which order a column is added up depends on where in the matrix it is.
            out[run.start : run.stop] = gradient[:, run.start : run.stop].contiguous().sum(0)
        return out

    @property
    def _all_outputs(self) -> tuple[Block, ...]:
        return (*self.outputs, self.apart) if self.apart else self.outputs


WHOLE = Cut()
"""Not cut: fast mode."""


def _summed(a: Tensor, b: Tensor, blocks: Sequence[Block]) -> Tensor:
    """``a @ b^T`` of ``[..., k]`` and ``[n, k]``: each block of ``k`` on its own, their products added as a tree."""
    return tree_sum([product(take(a, -1, block), take(b, 1, block)) for block in blocks])


def _summed_over_rows(a: Tensor, b: Tensor, blocks: Sequence[Block]) -> Tensor:
    """``a @ b`` of ``[..., k]`` and ``[k, n]``, likewise."""
    return tree_sum([product(take(a, -1, block), take(b, 0, block).t()) for block in blocks])


def _columns(a: Tensor, b: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """``a @ b^T`` of ``[..., k]`` and ``[n, k]``, whose columns are as if each block of ``n`` were on its own."""
    a, b = _apart(a), _apart(b)
    alike = _columns_are_alike(_kind(a), _kind(b), blocks, suits_onednn(a), is_isolated())
    return product(a, b) if alike else _by_columns(a, b, blocks)


def _rows(a: Tensor, b: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """``a^T @ b`` of ``[k, m]`` and ``[k, n]``, whose rows are as if each block of ``m`` were on its own."""
    a, b = _apart(a), _apart(b)
    alike = _rows_are_alike(_kind(a), _kind(b), blocks, suits_onednn(a), is_isolated())
    return product(a.t(), b.t()) if alike else _by_rows(a, b, blocks)


def _apart(x: Tensor) -> Tensor:
    """``x`` with a place in memory for each element, as what is drawn to try a product has."""
    return x.contiguous() if 0 in x.stride() else x


def _by_columns(a: Tensor, b: Tensor, blocks: Sequence[Block]) -> Tensor:
    out = a.new_empty(*a.shape[:-1], b.shape[0])
    for run in (run for block in blocks for run in block if len(run)):
        out[..., run.start : run.stop] = product(a, b[run.start : run.stop].contiguous())
    return out


def _by_rows(a: Tensor, b: Tensor, blocks: Sequence[Block]) -> Tensor:
    out = a.new_empty(a.shape[1], b.shape[1])
    for run in (run for block in blocks for run in block if len(run)):
        out[run.start : run.stop] = product(a[:, run.start : run.stop].contiguous().t(), b.t())
    return out


_TRIED = 4096
"""Sums that are tried of a shape: of few terms, two orders often have the same bits."""

_Kind = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


def _kind(x: Tensor) -> _Kind:
    return tuple(x.shape), x.stride(), x.dtype, x.device


@functools.cache
def _columns_are_alike(a: _Kind, b: _Kind, blocks: tuple[Block, ...], onednn: bool, isolated: bool) -> bool:
    """Whether the library's product at once has the bits of the blocks' products: tried once for each shape.

    And once more in isolation, where numbers may be made up.
    """
    draws = _draws(a, b, math.prod(a[0][:-1]) * b[0][0])
    return all(torch.equal(product(x, y), _by_columns(x, y, blocks)) for x, y in draws)


@functools.cache
def _rows_are_alike(a: _Kind, b: _Kind, blocks: tuple[Block, ...], onednn: bool, isolated: bool) -> bool:
    draws = _draws(a, b, a[0][1] * b[0][1])
    return all(torch.equal(product(x.t(), y.t()), _by_rows(x, y, blocks)) for x, y in draws)


def _draws(a: _Kind, b: _Kind, results: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors of ``results`` sums, again and again until some sum of another order would hardly be missed."""
    for number in range(max(1, _TRIED // max(1, results))):
        yield _drawn(a, 2 * number + 1), _drawn(b, 2 * number + 2)


@torch.no_grad()
def _drawn(kind: _Kind, seed: int) -> Tensor:
    """Random values in a tensor of that kind, from a stream of their own."""
    shape, stride, dtype, device = kind
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(values)
