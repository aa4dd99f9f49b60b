"""Conversations into sequences: several in each, none in two, resumable at any sequence.

A lane's conversations are taken in groups: as many as fill a few sequences, and of one pass over the data. Within a
group each goes into the first sequence that has room for it. What a group has depends on where it begins alone, so
that a position is the group's first row and how many of its sequences were delivered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from argonne.data.chat.tokens import ChatEncoder, Trained
from argonne.data.corpus.row_groups import RowGroups
from argonne.data.corpus.shards import OnBad, Shard
from argonne.data.errors import DataError
from argonne.data.lanes.packing import Packed, beginning, check_lanes
from argonne.data.lanes.plan import LanePlan
from argonne.data.lanes.reader import Document, DocumentReader, dropped_summary
from argonne.data.lanes.state import LaneState
from argonne.data.tokens.encoder import batch_rows
from argonne.data.tokens.filters import TokenIds

GROUP = 16
"""A group ends with the conversation that makes its tokens so many sequences full. On average half a sequence of a
group stays empty."""


class ConversationReader(DocumentReader):
    """The conversations of any lane from any place: documents whose tokens are ``Trained``. See ``DocumentReader``."""

    def __init__(
        self,
        shards: Sequence[Shard],
        plan: LanePlan,
        encoder: ChatEncoder,
        on_bad: OnBad = "raise",
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.plan = plan
        self._row_groups = RowGroups(shards, on_bad, report)
        self._batch_rows = batch_rows()
        self._encoder = encoder

    def _outcomes(self, rows: list[object]) -> list[TokenIds | str]:
        return self._encoder(rows)

    def one_pass(self, lane: int) -> Iterator[TokenIds | str]:
        """What becomes of each row that the lane has in its first pass over the data."""
        for each in self._lists(lane, self.plan.enter(lane, 0), set()):
            if each.place.epoch > 0:
                return
            yield from each.outcomes


class ConversationStream:
    """Endless sequences of block_size + 1 tokens from each of the lanes served here; a ``LaneStream``.

    What a lane delivers depends on the shards, the tokenizer, its template, ``block_size`` and ``lanes`` alone.

    Args:
        padding: the id of what fills a sequence up: a document of its own, of no weight.
        states: the states of all lanes, in lane order, to go on from; None starts at the beginning.

    Raises:
        DataError: an argument is out of range, or a state does not belong to this corpus.
    """

    def __init__(
        self,
        reader: ConversationReader,
        block_size: int,
        served: Sequence[int],
        padding: int,
        states: Sequence[LaneState] | None = None,
    ) -> None:
        self.block_size, self.lanes, self.served = block_size, reader.plan.lanes, tuple(served)
        check_lanes(block_size, self.lanes, served, states)
        self._served = {
            lane: _Lane(lane, reader, states[lane] if states else beginning(reader.plan, lane), block_size + 1, padding)
            for lane in served
        }

    def next_sequence(self, lane: int) -> Packed:
        """The lane's next sequence of block_size + 1 tokens."""
        return self._served[lane].take()

    def state(self, lane: int) -> LaneState:
        """The lane's state after the last sequence it delivered, whatever was read ahead."""
        return self._served[lane].state


class _Lane:
    """Delivers one lane's groups, sequence after sequence."""

    def __init__(self, lane: int, reader: ConversationReader, state: LaneState, size: int, padding: int) -> None:
        self.state = state
        self._lane, self._plan, self._size, self._padding = lane, reader.plan, size, padding
        place = self._plan.find(lane, state.position)
        self._documents = reader.documents(lane, place, state.unreadable)
        self._held: Document | None = None
        self._sequences: list[list[Trained]] = []
        """Of the group: those that are still to be delivered."""
        self._after = state
        """The state once they all are, but for what it counts of them."""
        if state.position.token:
            self._open_group()
            del self._sequences[: state.position.token]
            if not self._sequences:
                raise DataError(
                    f"data position {state.position.to_dict()} of lane {lane} is in no group of conversations; "
                    "the data and the tokenizer must be those it was saved with"
                )

    def take(self) -> Packed:
        if not self._sequences:
            self._open_group()
        conversations = self._sequences.pop(0)
        counted = {
            "documents": self.state.documents + len(conversations),
            "tokens": self.state.tokens + sum(each.shape[1] for each in conversations),
        }
        if self._sequences:
            position = self.state.position
            self.state = replace(self.state, position=replace(position, token=position.token + 1), **counted)
        else:
            self.state = replace(self._after, **counted)
        return packed(conversations, self._size, self._padding)

    def _open_group(self) -> None:
        """Read the next group, and say where the one behind it begins."""
        group: list[Document] = []
        tokens, dropped, unreadable = 0, Counter(self.state.dropped), {*self.state.unreadable}
        while tokens < GROUP * self._size:
            document = self._held or next(self._documents)
            self._held = None
            if group and document.place.epoch != group[0].place.epoch:
                self._held = document
                break
            group.append(document)
            tokens += document.tokens.shape[1]
            dropped.update(document.dropped)
            unreadable.update(document.unreadable)
        sizes = [document.tokens.shape[1] for document in group]
        self._sequences = [[group[n].tokens for n in each] for each in first_fit(sizes, self._size)]
        # What cannot be read is known from now on: the group is to be the same when it is read again.
        self.state = replace(self.state, unreadable=tuple(sorted(unreadable)))
        behind = self._plan.position(self._plan.next_row(self._lane, group[-1].place), token=0)
        self._after = replace(self.state, position=behind, dropped=dict(dropped))


def packed(conversations: Sequence[Trained], size: int, padding: int) -> Packed:
    """One sequence of ``size`` tokens."""
    tokens, weights = np.full(size, padding, dtype=np.int64), np.zeros(size, dtype=np.int32)
    documents, filled = np.full(size, len(conversations), dtype=np.int32), 0
    for number, each in enumerate(conversations):
        here = slice(filled, filled := filled + each.shape[1])
        (tokens[here], weights[here]), documents[here] = each, number
    return Packed(tokens, documents, weights)


def first_fit(sizes: Sequence[int], most: int) -> list[list[int]]:
    """The indices of ``sizes`` in sequences of at most ``most`` tokens: each in the first that has room for it."""
    sequences: list[list[int]] = []
    room: list[int] = []
    for index, size in enumerate(sizes):
        place = next((number for number, left in enumerate(room) if left >= size), None)
        if place is None:
            place = len(room)
            room.append(most)
            sequences.append([])
        sequences[place].append(index)
        room[place] -= size
    return sequences


@dataclass(frozen=True)
class Pass:
    """What a corpus has for one pass over it."""

    rows: int
    dropped: dict[str, int]
    """Rows that are not used, by reason."""
    tokens: int
    """Of the others."""
    trained: int
    """Of these."""
    sequences: int

    def __str__(self) -> str:
        used = self.rows - sum(self.dropped.values())
        return (
            f"{used:,} conversations of {self.rows:,} rows (dropped: {dropped_summary(self.dropped)}), {self.tokens:,} "
            f"tokens, {self.trained:,} of them trained, in {self.sequences:,} sequences"
        )


def groups_of_pass(reader: ConversationReader, lane: int, size: int, dropped: Counter[str]) -> Iterator[list[Trained]]:
    """The groups of a lane's first pass over the data, whose other rows are counted in ``dropped``, by reason."""
    group: list[Trained] = []
    held = 0
    for outcome in reader.one_pass(lane):
        if isinstance(outcome, str):
            dropped[outcome] += 1
            continue
        group.append(outcome)
        held += outcome.shape[1]
        if held >= GROUP * size:
            yield group
            group, held = [], 0
    if group:
        yield group


def sequences_of_pass(reader: ConversationReader, size: int, padding: int) -> Iterator[Packed]:
    """The sequences of ``size`` tokens of one pass over a corpus, which has a single lane.

    Raises:
        DataError: there are none, or a row group cannot be read.
    """
    dropped: Counter[str] = Counter()
    group: list[Trained] = []
    for group in groups_of_pass(reader, 0, size, dropped):
        for each in first_fit([conversation.shape[1] for conversation in group], size):
            yield packed([group[number] for number in each], size, padding)
    if not group:
        raise _unusable(dropped)


def count_pass(reader: ConversationReader, size: int) -> Pass:
    """Go through a corpus once, lane by lane, and count the sequences of ``size`` tokens that all lanes have in a pass.

    They are as many in every other pass, in which each lane has what another one has here.

    Raises:
        DataError: there are none, or a row group cannot be read.
    """
    dropped: Counter[str] = Counter()
    used = tokens = trained = sequences = 0
    for lane in range(reader.plan.lanes):
        for group in groups_of_pass(reader, lane, size, dropped):
            sizes = [each.shape[1] for each in group]
            used, tokens = used + len(group), tokens + sum(sizes)
            trained += sum(int(each[1].sum()) for each in group)
            sequences += len(first_fit(sizes, size))
    if not sequences:
        raise _unusable(dropped)
    return Pass(used + sum(dropped.values()), dict(dropped), tokens, trained, sequences)


def _unusable(dropped: Counter[str]) -> DataError:
    return DataError(f"no usable conversations in the data; rows dropped: {dropped_summary(dropped)}")
