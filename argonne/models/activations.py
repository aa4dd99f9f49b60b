"""The activations that a block keeps from forward to backward, in bytes: closed forms, held by a test to what is kept.

Of the tokens ``T`` that a rank has inside tensor-parallel pairs and ``t`` between them (a share under sequence
parallelism): ``h`` hidden features, ``q`` of its queries, ``k`` of its keys (and as many of values) and ``m`` of its
feed-forward; ``c`` bytes an element of the compute dtype and ``a`` of that of statistics (docs/layouts.md has a table).
What is not counted: the masks of packed documents, attention's probabilities where they are dropped (not selectively),
and padding of heads in a reproducible run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from argonne.kernels.dispatch import uses_triton
from argonne.models.execution import Execution


@dataclass(frozen=True)
class Micro:
    """A micro-batch as a rank has it, and how it is computed with."""

    execution: Execution
    batch: int
    sequence: int

    @property
    def inside(self) -> int:
        """``T``: of this context-parallel rank."""
        return self.batch * self.sequence // self.execution.groups.context.size

    @property
    def between(self) -> int:
        """``t``"""
        groups = self.execution.groups
        return self.inside // (groups.tensor.size if groups.sequence_parallel else 1)

    @property
    def c(self) -> int:
        return self.execution.precision.compute.itemsize

    @property
    def a(self) -> int:
        return self.execution.precision.statistics.itemsize

    @property
    def in_triton(self) -> bool:
        execution = self.execution
        sample = torch.empty(0, dtype=execution.precision.compute, device=execution.groups.device)
        return uses_triton(execution.kernels, x=sample)

    def block_input(self, hidden: int) -> int:
        """All that a block keeps which is recomputed in full."""
        return self.between * hidden * self.c

    def attention(self, query: int, key: int, heads: int, in_order: bool) -> int:
        """What attention keeps besides what it is given: its result, and the sums of its softmax.

        Over several ranks, each of two runs of queries on its own, their results side by side, and the gathered keys
        and values; on a CPU also what each run may see. ``in_order``: count the last two.
        """
        groups, ranks = self.execution.groups, self.execution.groups.context.size
        found = self.inside * (query * self.c + heads * self.a)
        if ranks == 1:
            return found
        found += self.inside * query * self.c + in_order * self.inside * ranks * 2 * key * self.c
        run = self.sequence // (2 * ranks)
        return found + (run * run * (2 * ranks + 1) * self.c if groups.device.type == "cpu" else 0)


@dataclass(frozen=True)
class DecoderWidths:
    """What a rank has of a block of ``models/decoder.py``, in features."""

    hidden: int
    query: int
    key: int
    heads: int
    key_heads: int
    feed_forward: int
    copied_key: int = 0
    """Of keys that are copied to where queries need them; 0: none are."""
    is_indexed: bool = False
    """Whether that is by the numbers of their heads."""
    norms_heads: bool = False
    pinned_silu: bool = False

    def kept(self, micro: Micro) -> int:
        """Bytes where nothing is recomputed."""
        w, c, a, casts = self, micro.c, micro.a, micro.a != micro.c
        shared = micro.execution.groups.context.size > 1
        norm = 2 * w.hidden * c + 4 if micro.in_triton else 2 * w.hidden * a + a + w.hidden * c
        # Values are a view of what the projection makes, unless they are copied; so is what heads' norms keep.
        views = not (w.copied_key or shared) or (w.norms_heads and (micro.in_triton or not casts))
        attention = views * (w.query + 2 * w.key) * c + (w.query + w.key) * c + 2 * w.copied_key * c
        if w.norms_heads and micro.in_triton:
            attention += 4 * (w.heads + w.key_heads)
        elif w.norms_heads:
            attention += (1 + casts) * (w.query + w.key) * a + (w.heads + w.key_heads) * a
        gated = 2 * c if micro.in_triton or not casts else 2 * a
        silu = 0 if micro.in_triton else (1 + w.pinned_silu) * a
        feed_forward = w.feed_forward * (gated + silu + c)
        inside = micro.inside * (attention + feed_forward) + w.is_indexed * 2 * w.heads * torch.int64.itemsize
        return (
            micro.between * 2 * norm + inside + micro.attention(w.query, w.copied_key or w.key, w.heads, in_order=True)
        )

    def kept_selectively(self, micro: Micro) -> int:
        """Bytes where only what products, attention and collectives make is kept, and the block's input."""
        w, c = self, micro.c
        products = micro.inside * (w.query + 2 * w.key + 2 * w.feed_forward) * c
        attention = micro.attention(w.query, w.copied_key or w.key, w.heads, in_order=True)
        return micro.between * 2 * w.hidden * c + products + attention


@dataclass(frozen=True)
class Argonne1Widths:
    """The same of a block of Argonne 1.x, whose attention drops nothing."""

    hidden: int
    query: int
    heads: int
    feed_forward: int
    drops: bool = False
    """Whether it drops elements between the pairs."""

    def kept(self, micro: Micro) -> int:
        """Bytes where nothing is recomputed."""
        w, c = self, micro.c
        norm = w.hidden * micro.a + 2 * micro.a + w.hidden * c
        inside = micro.inside * (3 * w.query + 2 * w.feed_forward) * c
        return micro.between * 2 * (norm + w.drops * w.hidden) + inside + micro.attention(w.query, 0, w.heads, False)

    def kept_selectively(self, micro: Micro) -> int:
        """Bytes where only what products and attention make is kept, and the block's input."""
        w, c = self, micro.c
        inside = micro.inside * (3 * w.query + w.feed_forward) * c
        return micro.between * 2 * w.hidden * c + inside + micro.attention(w.query, 0, w.heads, False)


Widths = DecoderWidths | Argonne1Widths


def kept_by_blocks(widths: Widths, micro: Micro, numbers: Sequence[int]) -> int:
    """Bytes that the blocks of these numbers keep of a micro-batch, as ``execution.recompute`` says."""
    recompute = micro.execution.recompute
    full = sum(recompute.is_full(number) for number in numbers)
    other = widths.kept_selectively(micro) if recompute.selective else widths.kept(micro)
    return full * micro.block_input(widths.hidden) + (len(numbers) - full) * other


def told(widths: Widths, execution: Execution, shape: tuple[int, int], numbers: Sequence[int]) -> str:
    """What a run of micro-batches of that shape (sequences, positions) says of its recomputation as it begins."""
    kept = kept_by_blocks(widths, Micro(execution, *shape), numbers) / 2**20
    return f"recompute {execution.recompute}, {kept:,.1f} MiB of activations a micro-batch"
