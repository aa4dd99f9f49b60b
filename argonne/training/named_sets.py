"""Named held-out sets (``--eval``): read before training, measured at an interval of their own."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from argonne.data import Shard, naming
from argonne.data.chat.source import Conversations
from argonne.data.corpus.formats import Rows
from argonne.data.corpus.shards import open_texts
from argonne.data.lanes.plan import LanePlan
from argonne.data.lanes.reader import DocumentReader
from argonne.data.source import Reading, Source, Texts
from argonne.data.tokens.byte_lengths import ByteLengths
from argonne.data.tokens.filters import Filters
from argonne.models import LanguageModel, LossFunction
from argonne.parallel import ProcessGroups
from argonne.parallel.communication.collectives import collectively, gather_objects
from argonne.training.evaluation import held_out_loss, held_out_sequences, predicted

_TEXTS = Texts()
Measured = dict[str, dict[str, float | None]]
"""Of each set by its name ``loss`` and ``bits_per_byte``."""


@dataclass(frozen=True)
class NamedSet:
    """One set, on every rank."""

    sequences: Tensor
    """``held_out_sequences``."""
    bytes: int | None = None
    """Of the text that they predict, UTF-8; None of conversations, of which a part is predicted."""
    rows: str = ""
    """What the rows of a set of conversations are; on the first rank."""

    @property
    def tokens(self) -> int:
        """That are predicted, and count."""
        return predicted(self.sequences)


def read_named(
    shards: Mapping[str, Sequence[Shard]],
    globs: Mapping[str, str],
    tokenizer: PreTrainedTokenizerFast | None,
    block_size: int,
    boundary: tuple[int, int] | None,
    limit: int | None,
    groups: ProcessGroups,
    source: Source = _TEXTS,
) -> dict[str, NamedSet]:
    """Every set on every rank, read by the first (collective). Arguments are those of ``held_out_sequences``.

    Raises:
        DataError: the text of a set is shorter than one sequence, or none of its conversations can be used.
    """
    found = {}
    for name, own in shards.items():
        told = [f"{name}={globs[name]}"]
        sequences = held_out_sequences(own, tokenizer, block_size, boundary, limit, groups, told, source, flag="eval")
        shape = (sequences.shape[1], sequences.shape[2])
        count = functools.partial(_counted, tuple(own), told, tokenizer, shape, boundary, source)
        size, rows = gather_objects(collectively(count, groups.world), groups.world)[0]
        found[name] = NamedSet(sequences, size, rows)
    return found


def _counted(
    shards: tuple[Shard, ...],
    told: Sequence[str],
    tokenizer: PreTrainedTokenizerFast | None,
    shape: tuple[int, int],
    boundary: tuple[int, int] | None,
    source: Source,
) -> tuple[int | None, str]:
    """``NamedSet.bytes`` and ``NamedSet.rows``, on the first rank."""
    if tokenizer is None:
        return None, ""
    if isinstance(source, Conversations):
        with naming("eval", told):
            return None, str(source.count(Reading(shards, tokenizer, shape[1] - 1), lanes=1))
    assert isinstance(source, Texts)
    return predicted_bytes(shards, tokenizer, shape, boundary, source.filters), ""


def predicted_bytes(
    shards: Sequence[Shard],
    tokenizer: PreTrainedTokenizerFast,
    shape: tuple[int, int],
    boundary: tuple[int, int] | None,
    filters: Filters,
) -> int:
    """Bytes of the text that the first sequences, in number and length ``shape``, predict: all but their first tokens.

    BOS and EOS have none.
    """
    plan, lengths_of = LanePlan(shards, 1), ByteLengths(tokenizer)
    reader = DocumentReader(shards, plan, tokenizer, boundary, filters=filters)
    around = int(boundary is not None)
    held: dict[tuple[int, int], Rows] = {}
    lengths: list[int] = []
    wanted = shape[0] * shape[1]
    for document in reader.documents(0, plan.enter(0, 0)):
        where = plan.row_group(document.place)
        if where not in held:
            held = {where: open_texts(shards[where[0]], where[1])}
        (text,) = held[where].rows(document.place.row, document.place.row + 1)
        assert isinstance(text, str)
        ids = document.tokens[around : len(document.tokens) - around]
        lengths += [*[0] * around, *lengths_of.of(text, ids, wanted - len(lengths)).tolist(), *[0] * around]
        if len(lengths) >= wanted:
            break
    return int(np.array(lengths[:wanted]).reshape(shape)[:, 1:].sum())


class NamedSets:
    """The sets of one run as it goes on. Every method but ``lines`` is collective over all ranks."""

    def __init__(self, sets: Mapping[str, NamedSet], interval: int, total_steps: int) -> None:
        self._sets, self._interval, self._total = sets, interval, total_steps
        self.seconds = 0.0
        """The longest that training has waited for them."""

    def due(self, step: int) -> bool:
        """Whether they are measured after this step: what a run tells does not depend on where it was stopped."""
        return bool(self._sets) and (step % self._interval == 0 or step == self._total)

    @property
    def fields(self) -> dict[str, Any]:
        """What the line of a step has of them before, or without, their being measured."""
        return {"eval": None} if self._sets else {}

    def measure(
        self, model: LanguageModel, micro_batch: int, loss: LossFunction, document_mask: bool
    ) -> tuple[Measured, str]:
        """Loss (nats a token) and bits per byte of each; and at the first time, a line on how long it took."""
        found: Measured = {}
        took = {}
        for name, each in self._sets.items():
            began = time.perf_counter()
            nats = held_out_loss(model, each.sequences, micro_batch, loss, document_mask)
            bits = None if each.bytes is None else nats * each.tokens / math.log(2) / max(each.bytes, 1)
            found[name] = {"loss": nats, "bits_per_byte": bits}
            took[name] = time.perf_counter() - began
        first, total = not self.seconds, sum(took.values())
        self.seconds = max(self.seconds, total)
        each_took = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in took.items())
        return found, f"eval: training waits {total:.2g} s at each ({each_took})" if first else ""


def announced(sets: Mapping[str, NamedSet], interval: int) -> list[str]:
    """How much text each set is, for the log, before anything is measured."""
    lines = []
    for name, each in sets.items():
        size = f"{each.tokens:,} tokens that count" if each.bytes is None else f"{each.tokens:,} tokens"
        size += "" if each.bytes is None else f", {each.bytes:,} bytes"
        used = f"{each.sequences.shape[1]:,} sequences, {size}, after every {interval:,} steps"
        lines.append(f"eval {name}: {used}; the first tells how long it takes")
        lines += [f"eval {name}: {each.rows}"] if each.rows else []
    return lines
