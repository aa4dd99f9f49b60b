"""The logits behind texts that grow by a token at a time: with a cache, where the model has one, or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from argonne.models import CachingModel, KeyValueCache, LanguageModel, Scores
from argonne.parallel.communication.groups import Axis


@dataclass
class Row:
    """A text that grows."""

    number: int
    """The prompt's, among all of them."""
    ids: list[int]
    """The prompt's tokens and the new ones."""
    prompt: int = field(init=False)
    """How many are the prompt's."""

    def __post_init__(self) -> None:
        self.prompt = len(self.ids)

    @property
    def new(self) -> list[int]:
        """The tokens that were added."""
        return self.ids[self.prompt :]


class Uncached:
    """Every pass sees the whole context of one row: for any ``LanguageModel``."""

    source = 0
    """The rank of the job whose draws count: all have the logits."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def scores(self, rows: Sequence[Row]) -> Scores | None:
        """The logits behind each row."""
        found = [self.model.next_token_logits(_tensor([_seen(row, self.model)], self.model)) for row in rows]
        logits = torch.cat(found)
        return Scores(logits, logits.shape[1], 0, Axis("tensor"))


class Cached:
    """The first pass is over all prompts, every later one over one token of each row.

    A row that is longer than the model can see slides out of the cache: its positions all change with every token, so
    that each pass computes its whole context anew.
    """

    def __init__(self, model: LanguageModel, longest: int) -> None:
        """``longest`` is the most tokens that a row will have when it is computed on."""
        assert isinstance(model, CachingModel)
        self.model, self.caching = model, model
        self.positions = min(longest, model.longest_sequence)
        self.source = model.scoring_stage * model.groups.stage.size
        self._cache: KeyValueCache | None = None
        self._rows: list[Row] = []

    def scores(self, rows: Sequence[Row]) -> Scores | None:
        """The logits behind each row, on the ranks that have them; ``rows`` are those of before, or some of them."""
        kept = [row for row in rows if len(row.ids) <= self.model.longest_sequence]
        sliding = [row for row in rows if len(row.ids) > self.model.longest_sequence]
        found = [self._go_on(kept) if kept else None]
        if not kept:
            self._cache = None
        if sliding:
            windows = [_seen(row, self.model) for row in sliding]
            counts = [len(window) for window in windows]
            found.append(self.caching.next_token_scores(_tensor(windows, self.model), counts, None))
        parts = [part for part in found if part is not None]
        if len(parts) < 2:
            return parts[0] if parts else None
        place = {id(row): index for index, row in enumerate([*kept, *sliding])}
        values = torch.cat([part.values for part in parts])[[place[id(row)] for row in rows]]
        return replace(parts[0], values=values)

    def _go_on(self, rows: list[Row]) -> Scores | None:
        if self._cache is None:
            self._cache = KeyValueCache(self.caching.cache_shape(), len(rows), self.positions)
            ids, counts = [row.ids for row in rows], [len(row.ids) for row in rows]
        else:
            place = {id(row): index for index, row in enumerate(self._rows)}
            self._cache.keep([place[id(row)] for row in rows])
            ids, counts = [row.ids[-1:] for row in rows], [1] * len(rows)
        self._rows = rows
        return self.caching.next_token_scores(_tensor(ids, self.model), counts, self._cache)


def _seen(row: Row, model: LanguageModel) -> list[int]:
    return row.ids[-model.longest_sequence :]


def _tensor(ids: Sequence[Sequence[int]], model: LanguageModel) -> Tensor:
    """``[rows, positions]``, padded on the right, where nothing sees it."""
    width = max(len(row) for row in ids)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], device=model.groups.device)
