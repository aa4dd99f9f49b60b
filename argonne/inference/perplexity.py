"""How well a model predicts documents: the loss of a token, perplexity and bits per byte, under any layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from argonne.data.errors import DataError, one_line
from argonne.data.tokens.byte_pair import contained
from argonne.data.tokens.tokenizer import plain_backend
from argonne.models import Batch, CrossEntropyLoss, LanguageModel
from argonne.parallel import ArgonneError, ProcessGroups
from argonne.parallel.communication.reduction import sum_over
from argonne.parallel.legal import require_whole

NO_TARGET = -100


@dataclass(frozen=True)
class Scoring:
    """How documents are shared out into what a model sees at once."""

    window: int
    """Tokens that the model sees at once, at most."""
    stride: int
    """Tokens by which the next window of a long document begins later: each window but the first scores so many."""
    batch: int = 8
    """Windows that are computed together."""

    def check(self, longest: int) -> None:
        """Raise ``ArgonneError`` for what is not legal, of a model that sees ``longest`` tokens at once."""
        require_whole("window", self.window, 1, longest)
        require_whole("stride", self.stride, 1, self.window)
        require_whole("batch_size", self.batch, 1)


@dataclass(frozen=True)
class Perplexity:
    """What was found."""

    documents: int
    """With at least one token that was scored."""
    skipped: int
    """Without one: empty, null, or of a single token, which nothing comes before."""
    tokens: int
    """Scored: all of a document but the first."""
    bytes: int
    """Of the scored text, in UTF-8."""
    nats: float
    """The summed loss."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Which, unlike the others, can be compared between tokenizers."""
        return self.nats / math.log(2) / self.bytes


def perplexity(
    model: LanguageModel, tokenizer: PreTrainedTokenizerFast, documents: Iterable[str | None], scoring: Scoring
) -> Perplexity:
    """Score every token of every document once, but for the first of each (collective; the same on every rank).

    A document is tokenised as the tokenizer does by itself, with the BOS that some put first.

    Args:
        model: with its weights.
        tokenizer: its own.
        documents: the same on every rank.
        scoring: how.

    Raises:
        ArgonneError: there is nothing to score, or the model's loss is not finite.
        DataError: a text cannot be tokenised, or has tokens that the model does not know.
    """
    scoring.check(model.longest_sequence)
    corpus = _Documents(plain_backend(tokenizer), model.shape.get("vocab_size"))
    found = corpus.windows(documents, scoring)
    groups, loss = model.groups, CrossEntropyLoss()
    nats = torch.zeros((), dtype=torch.float64, device=groups.device)
    while some := list(islice(found, scoring.batch)):
        ids, targets = _padded(some, groups)
        nats += model.evaluate(Batch(ids, targets), loss)
    if not corpus.tokens:
        raise ArgonneError("there is nothing to score; legal: a document of at least two tokens")
    total = sum_over(nats, groups.replicas).item()
    if not math.isfinite(total):
        raise ArgonneError("the model's loss is not finite: its weights have diverged")
    return Perplexity(corpus.documents, corpus.skipped, corpus.tokens, corpus.bytes, total)


Window = tuple[list[int], list[int]]
"""Ids, and the targets of their positions; ``NO_TARGET`` where another window scores them."""


def windows(ids: list[int], size: int, stride: int) -> Iterator[Window]:
    """What a model is shown of one document: at most ``size`` ids each, every id but the first a target once.

    A target is scored in the first window that has it: past the first window it has ``size - stride`` ids before it
    at least, and ``size`` at most.
    """
    scored, last = 0, len(ids) - 1
    for begin in range(0, last, stride):
        end = min(begin + size, last)
        yield ids[begin:end], [NO_TARGET] * (scored - begin) + ids[scored + 1 : end + 1]
        scored = end
        if end == last:
            return


@dataclass
class _Documents:
    """Documents on their way to windows, and what there was of them."""

    backend: Tokenizer
    vocabulary: int | None
    documents: int = 0
    skipped: int = 0
    tokens: int = 0
    bytes: int = 0

    def windows(self, texts: Iterable[str | None], scoring: Scoring) -> Iterator[Window]:
        for text in texts:
            ids, scored_from = self._tokens(text or "")
            if len(ids) < 2:
                self.skipped += 1
                continue
            self.documents += 1
            self.tokens += len(ids) - 1
            self.bytes += len((text or "")[scored_from:].encode())
            yield from windows(ids, scoring.window, scoring.stride)

    def _tokens(self, text: str) -> tuple[list[int], int]:
        """The ids of a text, and the character up to which the first of them reaches: 0 for a BOS."""
        try:
            encoding = self.backend.encode(text)
        except BaseException as error:
            if not contained(error):
                raise
            raise DataError(f"a text cannot be tokenised: {one_line(error)}: {text[:40]!r}") from error
        ids = encoding.ids
        if self.vocabulary is not None and ids and max(ids) >= self.vocabulary:
            raise DataError(
                f"the tokenizer gives id {max(ids)}, which the model of vocab_size={self.vocabulary} has not; legal: "
                "the model's own tokenizer"
            )
        return ids, encoding.offsets[0][1] if ids else 0


def _padded(some: list[Window], groups: ProcessGroups) -> tuple[Tensor, Tensor]:
    """Windows of one length that every axis can share out; what is added comes last, and no target sees it."""
    share = (2 * groups.context.size if groups.context.size > 1 else 1) * (
        groups.tensor.size if groups.sequence_parallel else 1
    )
    length = -(-max(len(ids) for ids, _ in some) // share) * share
    ids = torch.zeros(len(some), length, dtype=torch.int64)
    targets = torch.full_like(ids, NO_TARGET)
    for row, window in enumerate(some):
        for tensor, values in zip((ids, targets), window, strict=True):
            tensor[row, : len(values)] = torch.tensor(values)
    return ids.to(groups.device), targets.to(groups.device)
