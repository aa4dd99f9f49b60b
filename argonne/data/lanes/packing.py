"""Packing: the documents of each lane joined end to end, cut into sequences, resumable at any token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from argonne.data.corpus.shards import OnBad, Shard
from argonne.data.errors import DataError
from argonne.data.lanes.plan import LanePlan
from argonne.data.lanes.reader import Document, DocumentReader
from argonne.data.lanes.state import LaneState
from argonne.data.tokens.filters import FILTERS, Filters

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """One sequence, and which of its tokens belong together."""

    tokens: Tokens
    """``[block_size + 1]`` ids."""
    documents: npt.NDArray[np.int32]
    """``[block_size + 1]``: the number of each token's document, 0 for the first (or rest of one) in the sequence."""
    weights: npt.NDArray[np.int32] | None = None
    """``[block_size + 1]``: what the loss of each token counts, where it has been foretold. None: each counts 1."""


class SequenceStream:
    """Endless sequences of block_size + 1 tokens from each of the lanes that this process serves.

    Sequences of a lane do not overlap and leave nothing out: the tail of a document opens the next sequence.
    What a lane delivers depends on the shards, the tokenizer, `boundary`, `filters`, `block_size` and `lanes` alone.

    Args:
        lanes: lanes of the whole run; fixed for its life (see `default_lanes`).
        boundary: the (BOS, EOS) ids put around each document, or None.
        served: the lanes that are read here.
        states: the states of all lanes, in lane order, to go on from; None starts at the beginning.
        on_bad: what a row group that cannot be read does: "raise", or "skip" it (see `DocumentReader`).
        report: is given one line for each row group that is skipped, once.

    Raises:
        DataError: an argument is out of range, or a state does not belong to this corpus.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        tokenizer: PreTrainedTokenizerFast,
        block_size: int,
        lanes: int,
        boundary: tuple[int, int] | None,
        served: Sequence[int],
        states: Sequence[LaneState] | None = None,
        on_bad: OnBad = "raise",
        report: Callable[[str], None] | None = None,
        fast: bool = True,
        filters: Filters = FILTERS,
    ) -> None:
        check_lanes(block_size, lanes, served, states)
        plan = LanePlan(shards, lanes)
        self.block_size = block_size
        self.lanes = lanes
        self.served = tuple(served)
        reader = DocumentReader(shards, plan, tokenizer, boundary, on_bad, report, fast, filters)
        self._served = {lane: _Lane(lane, reader, states[lane] if states else beginning(plan, lane)) for lane in served}

    def next_sequence(self, lane: int) -> Packed:
        """The lane's next sequence of block_size + 1 tokens."""
        return self._served[lane].take(self.block_size + 1)

    def state(self, lane: int) -> LaneState:
        """The lane's state after the last sequence it delivered, whatever was read ahead."""
        return self._served[lane].state


class _Lane:
    """Cuts one lane's documents; `state` moves only when a sequence is complete."""

    def __init__(self, lane: int, reader: DocumentReader, state: LaneState) -> None:
        self.state = state
        self._lane = lane
        self._plan = reader.plan
        self._place = self._plan.find(lane, state.position)
        self._token = state.position.token
        self._finished = state.documents
        self._dropped = Counter(state.dropped)
        self._unreadable = state.unreadable
        self._documents = reader.documents(lane, self._place, state.unreadable)
        self._open: Document | None = None

    def take(self, count: int) -> Packed:
        taken = Packed(np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int32))
        filled = number = 0
        while filled < count:
            document = self._open or self._next_document()
            piece = document.tokens[self._token : self._token + count - filled]
            taken.tokens[filled : filled + len(piece)] = piece
            taken.documents[filled : filled + len(piece)] = number
            filled += len(piece)
            self._token += len(piece)
            if self._token == len(document.tokens):
                self._finish(document)
                number += 1
        self.state = LaneState(
            position=self._plan.position(self._place, self._token),
            documents=self._finished,
            tokens=self.state.tokens + count,
            dropped=dict(self._dropped),
            unreadable=self._unreadable,
        )
        return taken

    def _next_document(self) -> Document:
        document = next(self._documents)
        if document.unreadable:
            self._unreadable = tuple(sorted({*self._unreadable, *document.unreadable}))
        if self._plan.row_group(self._place) in self._unreadable:  # the document it was in cannot be read any more
            self._token = 0
        if self._token and (document.place != self._place or len(document.tokens) <= self._token):
            raise DataError(
                f"data position {self.state.position.to_dict()} of lane {self._lane} is in no document; "
                "the data and the tokenizer must be those it was saved with"
            )
        self._dropped.update(document.dropped)
        self._place = document.place
        self._open = document
        return document

    def _finish(self, document: Document) -> None:
        self._finished += 1
        self._place = self._plan.next_row(self._lane, document.place)
        self._token = 0
        self._open = None


def check_lanes(block_size: int, lanes: int, served: Sequence[int], states: Sequence[LaneState] | None) -> None:
    """Raise ``DataError`` for arguments that no stream of lanes can have, whatever it reads."""
    if block_size < 1:
        raise DataError(f"block_size={block_size} is not a positive number of tokens")
    if lanes < 1:
        raise DataError(f"lanes={lanes} is not a positive number")
    if not all(0 <= lane < lanes for lane in served):
        raise DataError(f"served={list(served)} names lanes outside 0 to {lanes - 1}")
    if states is not None and len(states) != lanes:
        raise DataError(f"{len(states)} lane states were saved, and lanes={lanes}; the two must be equal")


def beginning(plan: LanePlan, lane: int) -> LaneState:
    """Of a lane that has delivered nothing yet."""
    return LaneState(plan.position(plan.enter(lane, epoch=0)))
