"""Text from a model, under any layout: prompts in, tokens out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch

from argonne.inference.passes import Cached, Row, Uncached
from argonne.inference.sampling import NOT_FINITE, Sampling, draw, uniform
from argonne.models import CachingModel, LanguageModel
from argonne.parallel.communication.collectives import broadcast
from argonne.parallel.errors import ArgonneError


class Follower(Protocol):
    """Who is told of a text's tokens as they come, on every rank alike."""

    def take(self, token: int) -> bool:
        """Hear of a new token; whether the text ends with it."""
        ...


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: Sampling,
    seed: int,
    stop: int | Collection[int] | None = None,
) -> list[int]:
    """``continue_all`` of one prompt."""
    return continue_all(model, [prompt], sampling, seed, stop)[0]


@torch.no_grad()
def continue_all(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    stop: int | Collection[int] | None = None,
    *,
    batch: int | None = None,
    followers: Sequence[Follower] | None = None,
    cached: bool = True,
    first: int = 0,
) -> list[list[int]]:
    """Continue ``prompts``; every rank of the job calls this and gets the same tokens.

    A prompt's tokens do not depend on the others, nor on the layout but for rounding.

    Args:
        model: the model; the context that it sees is its longest sequence.
        prompts: each of at least one token id.
        sampling: how tokens are drawn.
        seed: of the draws.
        stop: a token, or several, that end a text (the one that did is not returned), or None.
        batch: how many texts are written at a time; None: all.
        followers: one for each prompt.
        cached: keep keys and values of what was seen, where the model can.
        first: the number of the first prompt, if there were others before.

    Returns:
        The new token ids of each prompt.

    Raises:
        ArgonneError: a prompt has no tokens, or the model's logits are not finite.
    """
    if not all(prompts):
        raise ArgonneError("the prompt has no tokens; legal: at least one")
    ends = {stop} if isinstance(stop, int) else set(stop or ())
    rows = [Row(first + number, list(prompt)) for number, prompt in enumerate(prompts)]
    step = batch or len(rows)
    for start in range(0, len(rows), step):
        own = slice(start, start + step)
        _write(model, rows[own], sampling, seed, ends, None if followers is None else followers[own], cached)
    return [row.new for row in rows]


def cache_line(model: LanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling, batch: int) -> str:
    """What the largest cache of these prompts takes of a rank's memory; of a model without one, that it has none."""
    if not isinstance(model, CachingModel):
        return f"no cache: model={type(model).__name__} computes the whole context for every token"
    shape, most, widest = model.cache_shape(), 0, (0, 0)
    for start in range(0, len(prompts), batch):
        own = prompts[start : start + batch]
        positions = min(_longest([len(prompt) for prompt in own], sampling), model.longest_sequence)
        if (size := shape.bytes(len(own), positions)) >= most:
            most, widest = size, (len(own), positions)
    kind = str(shape.dtype).removeprefix("torch.")
    return (
        f"cache: {most / 2**30:.3f} GiB on this rank, {widest[0]} x {widest[1]:,} positions, "
        f"{len(shape.layers)} layers of {shape.heads} key-value heads in {kind}"
    )


def _longest(prompts: Sequence[int], sampling: Sampling) -> int:
    """The most tokens that a row has when it is computed on: the last one is not."""
    return max(prompts) + max(sampling.max_new_tokens, 1) - 1


def _write(
    model: LanguageModel,
    rows: list[Row],
    sampling: Sampling,
    seed: int,
    ends: set[int],
    followers: Sequence[Follower] | None,
    cached: bool,
) -> None:
    """Add to each row until it ends."""
    longest = _longest([len(row.ids) for row in rows], sampling)
    passes = Cached(model, longest) if cached and isinstance(model, CachingModel) else Uncached(model)
    follower = {} if followers is None else {row.number: f for row, f in zip(rows, followers, strict=True)}
    for _ in range(sampling.max_new_tokens):
        scores = passes.scores(rows)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=model.groups.device)
        if scores is not None:
            numbers = [uniform(seed, row.number, len(row.ids)) for row in rows]
            tokens = draw(scores, sampling, [row.ids for row in rows], numbers)
        going = []
        for row, token in zip(rows, broadcast(tokens, model.groups.world, passes.source).tolist(), strict=True):
            if token == NOT_FINITE:
                raise ArgonneError("the model's logits are not finite: its weights have diverged")
            if token in ends:
                continue
            row.ids.append(token)
            if not (row.number in follower and follower[row.number].take(token)):
                going.append(row)
        rows = going
        if not rows:
            return
