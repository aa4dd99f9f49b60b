"""How the next token is drawn: the same at every layout, in every batch, whatever else is drawn.

The number that decides a draw follows from the seed, the prompt's number and the token's position alone. It is looked
up in the cumulative probabilities of the candidates, in float64, most likely first, by id where two are equally likely.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from argonne.models import Scores
from argonne.parallel.communication.collectives import all_gather
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_number, require_whole

NOT_FINITE = -1
"""In the place of a token, where a model's logits are no numbers."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    max_new_tokens: int = 100
    """Tokens to add, at most."""
    temperature: float = 0.7
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 50
    """Draw from this many most likely tokens; 0 for all."""
    top_p: float = 0.9
    """Draw from the fewest most likely tokens that have this probability together; 1 for all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that the text has, and multiplies the negative ones; 1 leaves them."""

    def __post_init__(self) -> None:
        require_whole("max_new_tokens", self.max_new_tokens, 0)
        require_number("temperature", self.temperature, zero=True)
        require_whole("top_k", self.top_k, 0)
        if not 0 < self.top_p <= 1:
            raise ArgonneError(f"top_p={self.top_p} is not legal; legal: more than 0, at most 1")
        require_number("repetition_penalty", self.repetition_penalty)


@dataclass(frozen=True)
class Candidates:
    """The tokens that may come next, most likely first: the same on every rank that has logits."""

    values: Tensor
    """``[rows, candidates]`` logits in float64; not a number first, where the model has such."""
    ids: Tensor
    """``[rows, candidates]``"""


def uniform(seed: int, prompt: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: that of one draw."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw(scores: Scores, sampling: Sampling, seen: Sequence[Sequence[int]], numbers: Sequence[float]) -> Tensor:
    """A token id for each row, ``[rows]``; ``NOT_FINITE`` where the logits are not (collective over ``scores.axis``).

    Args:
        scores: the logits.
        sampling: how to draw.
        seen: the tokens of each row, which ``repetition_penalty`` makes less likely.
        numbers: of each draw, from ``uniform``.
    """
    if sampling.repetition_penalty != 1:
        scores = penalised(scores, sampling.repetition_penalty, seen)
    found = candidates(scores, 1 if sampling.temperature == 0 else sampling.top_k)
    index = torch.zeros(len(numbers), dtype=torch.int64, device=found.ids.device)
    if sampling.temperature > 0:
        index = chosen(found.values, sampling, torch.tensor(numbers, dtype=torch.float64, device=found.ids.device))
    tokens = found.ids.gather(1, index[:, None])[:, 0]
    return torch.where(found.values[:, 0].isnan(), NOT_FINITE, tokens)


def penalised(scores: Scores, penalty: float, seen: Sequence[Sequence[int]]) -> Scores:
    """The scores with those of tokens that were seen made less likely (arXiv 1909.05858, section 4.1)."""
    values = scores.values.to(torch.float64, copy=True)
    for row, tokens in zip(values, seen, strict=True):
        own = sorted({token - scores.first for token in tokens if 0 <= token - scores.first < scores.tokens})
        at = torch.tensor(own, dtype=torch.int64, device=values.device)
        old = row[at]
        row[at] = torch.where(old < 0, old * penalty, old / penalty)
    return Scores(values, scores.tokens, scores.first, scores.axis)


def candidates(scores: Scores, count: int) -> Candidates:
    """The ``count`` most likely tokens of each row, or all of them for 0 (collective over ``scores.axis``)."""
    values, axis = scores.values, scores.axis
    if scores.tokens:
        total = values[:, : scores.tokens].sum(-1, dtype=torch.promote_types(values.dtype, torch.float32))
        if not (finite := total.isfinite()).all():  # so that it comes first, here and where it is sent
            values = torch.where(finite[:, None], values, torch.nan)
    found = _most_likely(values, min(count, values.shape[1]) or values.shape[1])
    found = Candidates(found.values.double(), found.ids + scores.first)
    if axis.size > 1:
        packed = all_gather(torch.stack([found.values, found.ids.double()]), axis)
        joined, ids = rearrange(packed, "rank kind row candidate -> kind row (rank candidate)")
        # A rank's ids are less than those of the next, so that what is equally likely stays in their order.
        joined, order = joined.sort(dim=-1, descending=True, stable=True)
        found = Candidates(joined, ids.gather(-1, order).long())
    return Candidates(found.values[:, : count or None], found.ids[:, : count or None])


def _most_likely(values: Tensor, count: int) -> Candidates:
    """The first ``count`` of each row in descending order; what is equal, by its place."""
    if count == 1:
        return Candidates(*values.max(dim=-1, keepdim=True))  # the first of those that are equal
    if count < values.shape[1]:
        best, places = values.topk(count, dim=-1)
        if (values >= best[:, -1:]).sum() == best.numel():  # no others are as likely as the last of them
            places = places.sort(dim=-1).values
            best, order = values.gather(-1, places).sort(dim=-1, descending=True, stable=True)
            return Candidates(best, places.gather(-1, order))
    ordered, places = values.sort(dim=-1, descending=True, stable=True)
    return Candidates(ordered[:, :count], places[:, :count])


def chosen(values: Tensor, sampling: Sampling, numbers: Tensor) -> Tensor:
    """Which candidate each row's number falls on: ``[rows]`` of ``[rows, candidates]`` logits in descending order."""
    probabilities = ((values - values[:, :1]) / sampling.temperature).softmax(-1)
    # A token stays while those before it have less than top_p together; the first always stays.
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(before < sampling.top_p, probabilities, 0.0)
    reached = kept.cumsum(-1)
    index = (reached <= numbers[:, None] * reached[:, -1:]).sum(-1)
    return torch.minimum(index, (kept > 0).sum(-1) - 1).clamp(min=0)
