"""The keys and values of positions that a model has seen, so that the next position costs no more than itself.

The first pass is over whole prompts, those of a batch padded on the right: attention is causal, so that nothing sees
what is added. Every later pass is over one position of each row, which is its own place in its own row: the key and
the value of a token overwrite what padding has left there, before anything may see it. Or it is over several of each
(``extension``), as where several texts go on from one beginning (``KeyValueCache.fork``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from argonne.models.extension import Extension
from argonne.parallel import context_parallel_attention
from argonne.parallel.communication.groups import Axis
from argonne.parallel.tensor_parallel.embedding import VocabularyRange

_ALONE = Axis("context")


@dataclass(frozen=True)
class CacheShape:
    """What a rank keeps of each position."""

    layers: Sequence[int]
    """The numbers of the rank's layers."""
    heads: int
    """The rank's key-value heads, each kept once however many query heads share it."""
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def bytes(self, rows: int, positions: int) -> int:
        """Of the cache of so many rows."""
        return 2 * len(self.layers) * rows * self.heads * positions * self.head_dim * self.dtype.itemsize


class KeyValueCache:
    """A rank's keys and values of a batch: in each of its layers ``[rows, heads, positions, head_dim]`` of both."""

    def __init__(self, shape: CacheShape, rows: int, positions: int) -> None:
        sizes = (rows, shape.heads, positions, shape.head_dim)
        self.shape, self.positions = shape, positions
        self.lengths: list[int] = [0] * rows
        """How many positions of each row are in it."""
        # Zeros: what is masked still counts for nothing only where it is a number.
        self._layers = {
            number: [torch.zeros(sizes, dtype=shape.dtype, device=shape.device) for _ in range(2)]
            for number in shape.layers
        }
        self.prepared: dict[int, Any] = {}
        """What stages have made of their weights and of this cache, by first layer, for all passes but the first."""

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the rows that are not among these; the others are numbered anew, in this order."""
        if list(rows) == list(range(len(self.lengths))):
            return
        chosen = torch.tensor(list(rows), device=self.shape.device)
        self.lengths = [self.lengths[row] for row in rows]
        for pair in self._layers.values():
            pair[:] = [kept[chosen] for kept in pair]
        self.prepared.clear()

    def fork(self, rows: Sequence[int], room: int) -> KeyValueCache:
        """Another cache, which begins with these rows, each as often as it is named, and has room for more of each."""
        lengths = [self.lengths[row] for row in rows]
        seen, chosen = max(lengths), torch.tensor(list(rows), device=self.shape.device)
        found = KeyValueCache(self.shape, len(lengths), seen + room)
        found.lengths = lengths
        for number, pair in self._layers.items():
            for kept, copy in zip(pair, found.layer(number), strict=True):
                copy[:, :, :seen] = kept[:, :, :seen][chosen]
        return found

    def begin(self, counts: Sequence[int]) -> CachePass:
        """A pass over so many new positions of each row: the first ones of all, or one or more behind them."""
        before, device = self.lengths, self.shape.device
        self.lengths = [length + count for length, count in zip(before, counts, strict=True)]
        seen = max(self.lengths)
        if not any(before):
            return CachePass(self, True, len(before), seen, torch.zeros(0, dtype=torch.int64, device=device), None)
        if set(counts) != {1}:
            several = Extension.of(before, counts, device)
            return CachePass(self, False, len(before), seen, several.positions, None, several)
        positions = torch.tensor(before, device=device)
        mask = None
        if len(set(before)) > 1:
            mask = (torch.arange(seen, device=device) <= positions[:, None])[:, None, None, :]
        return CachePass(self, False, len(before), seen, positions, mask)

    def layer(self, number: int) -> list[Tensor]:
        """The keys and the values of one layer."""
        return self._layers[number]


@dataclass(frozen=True)
class CachePass:
    """One pass of a model over positions that a cache takes in."""

    cache: KeyValueCache
    is_first: bool
    """Whether it is over whole prompts."""
    rows: int
    seen: int
    """Positions that the longest row has behind it."""
    positions: Tensor
    """``[rows]``, or as many as are new: where in its row each new position is, of a later pass."""
    mask: Tensor | None
    """``[rows, 1, 1, seen]``: what each row has of those, of a later pass; None where each has all."""
    several: Extension | None = None
    """Of a later pass that is not over one position of each row."""

    @property
    def is_one_each(self) -> bool:
        """Whether it is over one position of each row, behind what there is of it."""
        return not self.is_first and self.several is None

    def layer(self, number: int) -> LayerCache:
        """What attention of that layer is handed."""
        return LayerCache(self, *self.cache.layer(number))

    def write(self, kept: Tensor, new: Tensor) -> None:
        """Put ``new`` where it belongs: ``[rows, heads, positions, dim]``, of a later pass ``[new, heads, dim]``."""
        if self.is_first:
            kept[:, :, : new.shape[2]].copy_(new[:, :, : kept.shape[2]])
        elif self.several is not None:
            self.several.write(kept, new)
        elif self.mask is None:
            kept.select(2, self.seen - 1).copy_(new)
        else:
            kept[torch.arange(self.rows, device=kept.device), :, self.positions] = new


class LayerCache:
    """A pass as the attention of one layer sees it."""

    def __init__(self, whole: CachePass, keys: Tensor, values: Tensor) -> None:
        self._pass, self._keys, self._values = whole, keys, values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, used: Sequence[int] | None, pinned: bool) -> Tensor:
        """Causal attention to what is kept and what is new, which is kept from here on.

        Args:
            query: ``[rows, heads, positions, dim]`` of whole prompts; of a later pass ``[1, heads, new, dim]``, with
                positions at the end that were added to share them out.
            key: the same of this rank's key-value heads.
            value: likewise.
            used: the key-value head of each query head, where it is not that of runs of equally many.
            pinned: as of ``context_parallel_attention``.

        Returns:
            The shape of ``query``.
        """
        if self._pass.is_first:
            self._pass.write(self._keys, key)
            self._pass.write(self._values, value)
            if used is not None:
                key, value = key[:, used], value[:, used]
            return context_parallel_attention(query, key, value, _ALONE, pinned=pinned)
        count = len(self._pass.positions)
        added = query.shape[2] - count
        query, key, value = (new[0, :, :count].transpose(0, 1) for new in (query, key, value))
        attended = self.attend_rows(query, key, value, used, pinned).transpose(0, 1).unsqueeze(0)
        return F.pad(attended, (0, 0, 0, added)) if added else attended

    def attend_rows(
        self, query: Tensor, key: Tensor, value: Tensor, used: Sequence[int] | None, pinned: bool = False
    ) -> Tensor:
        """``attend`` of a later pass: of the new positions ``[new, its heads, dim]``, the shape of ``query``."""
        seen = self._pass.seen
        self._pass.write(self._keys, key)
        self._pass.write(self._values, value)
        keys, values = self._keys[:, :, :seen], self._values[:, :, :seen]
        if self._pass.several is not None:
            return self._pass.several.attend(query, keys, values, used, pinned)
        # The query heads of a group see the same: to the product they are queries of one head.
        even = None if used is None else _in_even_groups(tuple(used), query.device)
        grouped = (query if even is None else query.index_select(1, even[0])).unflatten(1, (keys.shape[1], -1))
        context = _one_position_attention(grouped, keys, values, self._pass.mask, pinned).flatten(1, 2)
        return context if even is None else context.index_select(1, even[1])


@functools.cache
def _in_even_groups(used: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Query heads of unequal groups, ascending, as groups of the largest's size: which go where, and come from where.

    The last of a smaller group is there more than once. A query is little beside the keys that it spares copying.
    """
    members = [[query for query, head in enumerate(used) if head == own] for own in range(max(used) + 1)]
    size = max(len(group) for group in members)
    spread = [query for group in members for query in (*group, *group[-1:] * (size - len(group)))]
    back = [spread.index(query) for query in range(len(used))]
    return torch.tensor(spread, device=device), torch.tensor(back, device=device)


def _one_position_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, pinned: bool = False
) -> Tensor:
    """Queries ``[rows, kv heads, group, dim]``, which see ``[rows, kv heads, seen, dim]``, or what the mask leaves."""
    width = query.shape[-1]
    padding = -width % (16 // query.element_size()) if pinned else 0
    if padding:  # as in context_parallel_attention: a head's bits do not depend on what lies beside it
        query, keys, values = (F.pad(x, (0, padding)) for x in (query, keys, values))
    if mask is not None:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    context = F.scaled_dot_product_attention(query, keys, values, mask, scale=width**-0.5)
    return context[..., :width] if padding else context


@dataclass(frozen=True)
class Scores:
    """The logits of the token after each row, as some ranks share them out by vocabulary."""

    values: Tensor
    """``[rows, width]``, this rank's; the same width on each, minus infinity where there is no token."""
    tokens: int
    """How many of them there are."""
    first: int
    """The id of the first."""
    axis: Axis
    """The ranks that have the others, whose ids ascend with the rank."""

    @classmethod
    def of(cls, logits: Tensor, held: VocabularyRange, axis: Axis) -> Scores:
        """Of ``[rows, held.rows]``, padding among them."""
        values = (
            logits
            if held.tokens == held.rows
            else F.pad(logits[:, : held.tokens], (0, held.rows - held.tokens), value=-inf)
        )
        return cls(values, held.tokens, held.start, axis)


@runtime_checkable
class CachingModel(Protocol):
    """A ``LanguageModel`` that can go on from keys and values that it keeps. Every method is collective."""

    @property
    def scoring_stage(self) -> int:
        """The rank along the pipeline that has the logits."""
        ...

    def cache_shape(self) -> CacheShape:
        """What this rank keeps of a position."""
        ...

    def next_token_scores(self, ids: Tensor, counts: Sequence[int], cache: KeyValueCache | None) -> Scores | None:
        """The logits behind each row, on the ranks of the stage that has them; elsewhere None.

        Args:
            ids: ``[rows, positions]``, which end with padding where a row has fewer.
            counts: how many each row has.
            cache: holds what comes before them, and takes them in. None: they are all there is.
        """
        ...

    def log_likelihoods(
        self,
        ids: Tensor,
        counts: Sequence[int],
        cache: KeyValueCache,
        places: Sequence[tuple[int, int]],
        targets: Sequence[int],
    ) -> Tensor | None:
        """The log-likelihood ``[places]`` of a token behind each place, on the ranks of the stage that has the logits.

        Args:
            ids: of a first pass as of ``next_token_scores``; of a later one ``[1, new]``, the rows' one after another.
            counts: how many each row has.
            cache: holds what comes before them, and takes them in.
            places: the row and the number among its new positions; a place may be named more than once.
            targets: the token behind each.
        """
        ...
