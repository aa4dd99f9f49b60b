"""What every save shows: the loss on held-out text, and text that the model writes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from argonne.data import DataError, SequenceStream, Shard, naming
from argonne.data.tokens.filters import FILTERS, Filters
from argonne.inference import Sampling, generate
from argonne.models import Batch, LanguageModel, LossFunction
from argonne.parallel import ProcessGroups
from argonne.parallel.communication.collectives import all_gather, broadcast, collectively, gather_objects
from argonne.parallel.communication.reduction import sum_over

PROMPT = "Long long time ago, "


def held_out_sequences(
    shards: Sequence[Shard],
    tokenizer: PreTrainedTokenizerFast | None,
    block_size: int,
    boundary: tuple[int, int] | None,
    limit: int,
    groups: ProcessGroups,
    globs: Sequence[str] | None = None,
    filters: Filters = FILTERS,
    flag: str = "validation_glob",
) -> Tensor:
    """The first sequences of the held-out text, ``[2, sequences, block_size + 1]`` on every rank (collective).

    First their ids, then the numbers of their documents. At most ``limit``, read once on the first rank, none twice.
    ``globs`` are what ``flag`` said, for messages; ``filters`` say which rows become documents.

    Raises:
        DataError: the text is shorter than one sequence.
    """

    def read() -> list[Tensor]:
        if not groups.is_first:
            return []
        with naming(flag, globs):
            return read_first()

    def read_first() -> list[Tensor]:
        assert tokenizer is not None
        stream = SequenceStream(shards, tokenizer, block_size, lanes=1, boundary=boundary, served=[0], filters=filters)
        found: list[Tensor] = []
        while len(found) < limit:
            packed = stream.next_sequence(0)
            sequence = torch.stack([torch.from_numpy(packed.tokens), torch.from_numpy(packed.documents)])
            state = stream.state(0).position
            # A sequence that runs into the second pass repeats text, unless it ends the first exactly.
            if state.epoch > 0 and (state.epoch, state.shard, state.row_group, state.row, state.token) > (
                1,
                0,
                0,
                0,
                0,
            ):
                break
            found.append(sequence)
            if state.epoch > 0:
                break
        if not found:
            raise DataError(f"the held-out text has fewer than block_size+1={block_size + 1} tokens; legal: more text")
        return found

    found = collectively(read, groups.world)
    count = gather_objects(len(found), groups.world)[0]
    sequences = torch.stack(found, 1) if found else torch.empty(2, count, block_size + 1, dtype=torch.int64)
    return broadcast(sequences.to(groups.device), groups.world)


@torch.no_grad()
def held_out_loss(
    model: LanguageModel, sequences: Tensor, micro_batch: int, loss: LossFunction, document_mask: bool = False
) -> float:
    """The mean loss per token over what ``held_out_sequences`` gave, with documents apart if training has them so.

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
        ids, documents = own if own.shape[1] else sequences[:, :1]
        apart = documents[:, :-1] if document_mask else None
        found = model.evaluate(Batch(ids[:, :-1], ids[:, 1:], apart), loss)
        if own.shape[1]:
            losses[number] = found
    add = _exact_total if reproducible else _fast_total
    return add(losses, model.groups) / sequences[0, :, 1:].numel()


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
