"""The log-likelihood of every choice, under any layout, with what questions have in common computed once.

Three levels, each with the keys and values of the one before: the beginning of all questions of a subject, the rest
of each question, and of each choice the tokens that others come behind. A choice of one token costs nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

import torch
from torch import Tensor

from argonne.inference.choices.prompts import Asked, Continuation
from argonne.models import CachingModel, KeyValueCache, LanguageModel
from argonne.parallel.communication.collectives import broadcast
from argonne.parallel.errors import ArgonneError

Tokens = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Beginning:
    """The first tokens of several contexts, seen."""

    tokens: Tokens
    cache: KeyValueCache | None
    """None where there are none."""


class Scorer:
    """Scores questions with a model; every rank of the job calls it with the same."""

    def __init__(self, model: LanguageModel, batch: int) -> None:
        """``batch`` is how many texts are computed at a time. Raises ``ArgonneError`` for a model without a cache."""
        if not isinstance(model, CachingModel):
            raise ArgonneError(f"model={type(model).__name__} has no cache of keys and values; legal: one that has")
        self.caching: CachingModel = model
        self.groups, self.batch = model.groups, batch

    def begin(self, questions: Iterable[Asked]) -> Beginning:
        """What the contexts of ``questions`` have in common, but for those that were truncated."""
        contexts = [one.continuations[0].context for one in questions if not one.truncated]
        tokens = common(contexts)
        if not tokens:
            return Beginning((), None)
        cache = KeyValueCache(self.caching.cache_shape(), 1, len(tokens))
        self.caching.log_likelihoods(self._tensor([tokens]), [len(tokens)], cache, [], [])
        return Beginning(tokens, cache)

    def score(self, questions: Sequence[Asked], beginning: Beginning) -> list[tuple[float, ...]]:
        """The log-likelihood of each choice of each question, the same on every rank.

        Raises:
            ArgonneError: one is not finite.
        """
        continuations = [each for question in questions for each in question.continuations]
        shared = [_shares(each.context, beginning) for each in continuations]
        found = torch.zeros(len(continuations), dtype=torch.float64)
        for begun in (True, False):
            own = [number for number, shares in enumerate(shared) if shares == begun]
            contexts = list(dict.fromkeys(continuations[number].context for number in own))
            for some in _chunks(contexts, self.batch):
                these = set(some)
                of_these = [number for number in own if continuations[number].context in these]
                self._score(continuations, of_these, some, beginning if begun else None, found)
        stage = self.groups.stage.size
        found = broadcast(found.to(self.groups.device), self.groups.world, self.caching.scoring_stage * stage).cpu()
        if not found.isfinite().all():
            raise ArgonneError("the model's log-likelihoods are not finite: its weights have diverged")
        values = iter(found.tolist())
        return [tuple(next(values) for _ in question.continuations) for question in questions]

    def _score(
        self,
        continuations: Sequence[Continuation],
        numbers: Sequence[int],
        contexts: Sequence[Tokens],
        beginning: Beginning | None,
        found: Tensor,
    ) -> None:
        """Add to ``found`` what the continuations of those ``numbers`` have, whose ``contexts`` these are."""
        rows = {context: row for row, context in enumerate(contexts)}
        if beginning is None or beginning.cache is None:
            new = contexts
            cache = KeyValueCache(self.caching.cache_shape(), len(rows), max(len(each) for each in contexts))
            ids = self._tensor(contexts)
        else:
            new = [each[len(beginning.tokens) :] for each in contexts]
            cache = beginning.cache.fork([0] * len(rows), max(len(each) for each in new))
            ids = self._tensor([sum(new, ())])
        own = [rows[continuations[number].context] for number in numbers]
        firsts = [continuations[number].tokens[0] for number in numbers]
        places = [(row, len(new[row]) - 1) for row in own]
        self._add(found, numbers, ids, [len(each) for each in new], cache, places, firsts)
        longer = [place for place, number in enumerate(numbers) if len(continuations[number].tokens) > 1]
        for some in _chunks(longer, self.batch):
            tokens = [continuations[numbers[place]].tokens for place in some]
            counts = [len(each) - 1 for each in tokens]
            forked = cache.fork([own[place] for place in some], max(counts))
            ids = self._tensor([sum((each[:-1] for each in tokens), ())])
            places = [(row, column) for row, count in enumerate(counts) for column in range(count)]
            targets = [token for each in tokens for token in each[1:]]
            owners = [numbers[place] for place, count in zip(some, counts, strict=True) for _ in range(count)]
            self._add(found, owners, ids, counts, forked, places, targets)

    def _add(
        self,
        found: Tensor,
        owners: Sequence[int],
        ids: Tensor,
        counts: Sequence[int],
        cache: KeyValueCache,
        places: Sequence[tuple[int, int]],
        targets: Sequence[int],
    ) -> None:
        likelihoods = self.caching.log_likelihoods(ids, counts, cache, places, targets)
        if likelihoods is not None:  # on the CPU, where sums have one order
            found.index_add_(0, torch.tensor(owners), likelihoods.double().cpu())

    def _tensor(self, rows: Sequence[Tokens]) -> Tensor:
        """``[rows, positions]``, padded on the right, where nothing sees it."""
        width = max(len(row) for row in rows)
        padded = [[*row, *[0] * (width - len(row))] for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=self.groups.device)


def common(contexts: Sequence[Tokens]) -> Tokens:
    """The tokens that all begin with, and at least one less than any has: something is left of each."""
    if not contexts:
        return ()
    first, last = min(contexts), max(contexts)
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return first[: min(alike, min(len(each) for each in contexts) - 1)]


def _shares(context: Tokens, beginning: Beginning) -> bool:
    tokens = beginning.tokens
    return bool(tokens) and len(context) > len(tokens) and context[: len(tokens)] == tokens


def _chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
