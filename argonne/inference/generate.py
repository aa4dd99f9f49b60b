"""Text from a model, under any layout."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from argonne.models import LanguageModel
from argonne.parallel.communication.collectives import broadcast
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_number, require_whole


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

    def __post_init__(self) -> None:
        require_whole("max_new_tokens", self.max_new_tokens, 0)
        require_number("temperature", self.temperature, zero=True)
        require_whole("top_k", self.top_k, 0)
        if not 0 < self.top_p <= 1:
            raise ArgonneError(f"top_p={self.top_p} is not legal; legal: more than 0, at most 1")


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: list[int],
    sampling: Sampling,
    seed: int,
    stop: int | Collection[int] | None = None,
) -> list[int]:
    """Continue ``prompt``; every rank of the job calls this and gets the same tokens.

    Args:
        model: the model; the context that it sees is its longest sequence.
        prompt: at least one token id.
        sampling: how tokens are drawn.
        seed: of the draws.
        stop: a token, or several, that end the text (the one that did is not returned), or None.

    Returns:
        The new token ids, without the prompt.
    """
    if not prompt:
        raise ArgonneError("the prompt has no tokens; legal: at least one")
    ends = {stop} if isinstance(stop, int) else set(stop or ())
    device = model.groups.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.tensor([prompt], device=device)
    for _ in range(sampling.max_new_tokens):
        logits = model.next_token_logits(ids[:, -model.longest_sequence :])[0]
        token = _draw(logits.float(), sampling, generator)
        broadcast(token, model.groups.world)
        if token.item() in ends:
            break
        ids = torch.cat((ids, token.view(1, 1)), dim=1)
    return ids[0, len(prompt) :].tolist()


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token id ``[1]`` from logits ``[vocabulary]``."""
    if sampling.temperature == 0:
        return logits.argmax().view(1)
    if not torch.isfinite(logits).all():
        raise ArgonneError("the model's logits are not finite: its weights have diverged")
    values, order = logits.sort(descending=True, stable=True)
    if sampling.top_k:
        values, order = values[: sampling.top_k], order[: sampling.top_k]
    probabilities = ((values - values[0]) / sampling.temperature).softmax(0)
    # A token stays while those before it have less than top_p together; the first always stays.
    before = probabilities.cumsum(0) - probabilities
    probabilities = torch.where(before < sampling.top_p, probabilities, 0.0)
    return order[torch.multinomial(probabilities, 1, generator=generator)]
