"""What every save shows: the loss on held-out text, and text that the model writes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from argonne.data import Shard, naming
from argonne.data.lanes.packing import Packed
from argonne.data.source import Reading, Source, Texts
from argonne.inference import Sampling, generate
from argonne.models import Batch, LanguageModel, LossFunction
from argonne.parallel import Objective, ProcessGroups
from argonne.parallel.communication.collectives import all_gather, broadcast, collectively, gather_objects
from argonne.parallel.communication.reduction import sum_over

PROMPT = "Long long time ago, "
_TEXTS, _IGNORED = Texts(), Objective().ignore_index


def held_out_sequences(
    shards: Sequence[Shard],
    tokenizer: PreTrainedTokenizerFast | None,
    block_size: int,
    boundary: tuple[int, int] | None,
    limit: int | None,
    groups: ProcessGroups,
    globs: Sequence[str] | None = None,
    source: Source = _TEXTS,
    flag: str = "validation_glob",
) -> Tensor:
    """The first sequences of held-out rows, ``[2 or 3, sequences, block_size + 1]`` on every rank (collective).

    First their ids, then the numbers of their documents, and of a ``source`` that weighs tokens what each of them
    counts, 0 or 1. At most ``limit`` (None: all), read once on the first rank, none twice. ``globs`` are what ``flag``
    said, for messages.

    Raises:
        DataError: the text is shorter than one sequence, or none of the rows can be used.
    """

    def read() -> list[Tensor]:
        if not groups.is_first:
            return []
        assert tokenizer is not None
        with naming(flag, globs):
            reading = Reading(tuple(shards), tokenizer, block_size, boundary)
            return [_planes(each) for each in source.held_out(reading, limit)]

    found = collectively(read, groups.world)
    count = gather_objects(len(found), groups.world)[0]
    shape = (2 + source.weighs, count, block_size + 1)
    sequences = torch.stack(found, 1) if found else torch.empty(shape, dtype=torch.int64)
    return broadcast(sequences.to(groups.device), groups.world)


def _planes(packed: Packed) -> Tensor:
    weights = () if packed.weights is None else (packed.weights,)
    return torch.stack(
        [torch.from_numpy(plane.astype(np.int64)) for plane in (packed.tokens, packed.documents, *weights)]
    )


def predicted(sequences: Tensor) -> int:
    """How many tokens of ``held_out_sequences`` the loss is the mean over: targets that count."""
    targets = sequences[:, :, 1:]
    return targets[0].numel() if len(targets) == 2 else int(targets[2].sum())


@torch.no_grad()
def held_out_loss(
    model: LanguageModel, sequences: Tensor, micro_batch: int, loss: LossFunction, document_mask: bool = False
) -> float:
    """The mean loss per token that counts of ``held_out_sequences``, with documents apart if training has them so.

    The data-parallel ranks share the work (collective). A pass through the model is collective too, under ``fsdp``
    for one: all of them make as many as the first, which has the most sequences, and what they make beyond their own
    does not count. In a reproducible run each pass has the same sequences at every layout, whoever makes it.
    """
    data = model.groups.data
    reproducible = model.groups.reproducible
    passes = -(-sequences.shape[1] // (data.size * micro_batch))
    losses = torch.zeros(passes, dtype=torch.float64, device=sequences.device)
    for number in range(passes):
        if reproducible:
            own = sequences[:, (number * data.size + data.rank) * micro_batch :][:, :micro_batch]
        else:
            own = sequences[:, data.rank :: data.size][:, number * micro_batch :][:, :micro_batch]
        ids, documents, *weights = own if own.shape[1] else sequences[:, :1]
        apart, targets = documents[:, :-1] if document_mask else None, ids[:, 1:]
        for each in weights:
            targets = targets.masked_fill(each[:, 1:] == 0, _IGNORED)
        found = model.evaluate(Batch(ids[:, :-1], targets, apart), loss)
        if own.shape[1]:
            losses[number] = found
    add = _exact_total if reproducible else _fast_total
    return add(losses, model.groups) / predicted(sequences)


def _fast_total(losses: Tensor, groups: ProcessGroups) -> float:
    """The sum of all ranks' losses, of which each has those of its positions of its passes."""
    total = torch.zeros((), dtype=losses.dtype, device=losses.device)
    for loss in losses:  # one after the other, so that a total does not depend on how torch adds up a vector
        total += loss
    return sum_over(total, groups.replicas).item()


def _exact_total(losses: Tensor, groups: ProcessGroups) -> float:
    """The same, rounded once: it depends on the losses alone, and not on whose they are."""
    return math.fsum(all_gather(sum_over(losses, groups.context), groups.data).flatten().tolist())


def sample_text(model: LanguageModel, tokenizer: PreTrainedTokenizerFast | None, tokens: int, seed: int) -> str | None:
    """``PROMPT`` and the model's continuation of so many tokens, on the ranks that have a tokenizer (collective)."""
    prompt: list[int] = []
    if tokenizer is not None:
        prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    prompt = gather_objects(prompt, model.groups.world)[0]
    added = generate(model, prompt, Sampling(max_new_tokens=tokens), seed, stop=None)
    return None if tokenizer is None else tokenizer.decode(prompt + added)
