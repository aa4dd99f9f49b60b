"""The documents of one lane, in order, read and tokenised only as far as they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from argonne.data.corpus.row_groups import RowGroups
from argonne.data.corpus.shards import OnBad, Shard
from argonne.data.errors import DataError
from argonne.data.lanes.plan import LanePlan, Place
from argonne.data.tokens.encoder import batch_rows, shared_encoder, tokeniser_pool
from argonne.data.tokens.filters import FILTERS, UNREADABLE, Filters, TokenIds, tokenise_rows

T = TypeVar("T")

# Text tokenised at a time: some documents are megabytes, and their encodings many times as large.
BATCH_CHARACTERS = 1 << 17


@dataclass(frozen=True)
class Document:
    """One accepted row."""

    place: Place
    tokens: TokenIds
    """Token ids, with BOS and EOS where boundary tokens are asked for."""
    dropped: Mapping[str, int]
    """Rows that the lane passed over between the document before and this one, by reason."""
    unreadable: tuple[tuple[int, int], ...] = ()
    """The (shard, row group) of each row group among them that was found to be unreadable."""


@dataclass(frozen=True)
class _List:
    """Consecutive rows of a unit, tokenised; or a unit that cannot be read."""

    place: Place
    """Of the first row."""
    outcomes: list[TokenIds | str]
    """What became of each row."""
    unreadable: int = 0
    """Rows that are passed over because their row group cannot be read."""
    found: tuple[tuple[int, int], ...] = ()
    """Their (shard, row group), where the lane did not know of it."""


class DocumentReader:
    """Reads any lane from any place. Lanes that are read are tokenised one list of rows ahead, in threads.

    Args:
        on_bad: "raise" stops at a row group that cannot be read; "skip" passes over its rows, counts them as
            "unreadable" and goes on. Each lane decides from the files alone, so that no layout changes a sample.
        report: is given one line for each row group that is passed over, once; from any thread.
        fast: tokenise by the fast path where there is one (see `Encoder`); the ids are the same.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        plan: LanePlan,
        tokenizer: PreTrainedTokenizerFast,
        boundary: tuple[int, int] | None,
        on_bad: OnBad = "raise",
        report: Callable[[str], None] | None = None,
        fast: bool = True,
        filters: Filters = FILTERS,
    ) -> None:
        self.plan = plan
        self._row_groups = RowGroups(shards, on_bad, report)
        self._encode = shared_encoder(tokenizer, fast)
        self._boundary = boundary
        self._filters = filters
        self._batch_rows = batch_rows()

    def documents(self, lane: int, place: Place, unreadable: Sequence[tuple[int, int]] = ()) -> Iterator[Document]:
        """The lane's documents from `place` on, epoch after epoch, without end.

        What the lane found `unreadable` before is not tried again, whatever it is by now: a lane that goes on
        delivers what it would have delivered without the stop.

        Raises:
            DataError: a row group cannot be read, or the lane went once through the whole corpus
                (as many epochs as there are lanes) and every row was dropped.
        """
        productive = place.epoch - (self.plan.enter(lane, place.epoch) == place)
        dropped: Counter[str] = Counter()
        met: list[tuple[int, int]] = []
        for each in ahead(self._lists(lane, place, set(unreadable)), tokeniser_pool()):
            epoch, unit, row = each.place.epoch, each.place.unit, each.place.row
            if epoch - productive > self.plan.lanes:
                break
            met += each.found
            if each.unreadable:
                dropped[UNREADABLE] += each.unreadable
            for offset, outcome in enumerate(each.outcomes):
                if isinstance(outcome, str):
                    dropped[outcome] += 1
                    continue
                yield Document(Place(epoch, unit, row + offset), outcome, dropped, tuple(met))
                dropped, met = Counter(), []
                productive = epoch
        raise DataError(f"no usable documents in the data; rows dropped: {dropped_summary(dropped)}")

    def _lists(self, lane: int, place: Place, unreadable: set[tuple[int, int]]) -> Iterator[_List]:
        """The lane's rows from `place` on, without end."""
        while True:
            unit = self.plan.units[place.unit]
            row_group = (unit.shard, unit.row_group)
            if row_group in unreadable:
                yield _List(place, [], unit.end - place.row)
            elif not self._row_groups.readable(*row_group):
                unreadable.add(row_group)
                yield _List(place, [], unit.end - place.row, (row_group,))
            else:
                row = place.row
                for rows in cut_batches(self._row_groups.rows(unit, row, self._batch_rows), self._batch_rows):
                    yield _List(Place(place.epoch, place.unit, row), self._outcomes(rows))
                    row += len(rows)
            place = self.plan.next_unit(lane, place)

    def _outcomes(self, rows: list[object]) -> list[TokenIds | str]:
        return tokenise_rows(rows, self._encode, self._boundary, self._filters)


def ahead(items: Iterator[T], pool: Executor) -> Iterator[T]:
    """The same items, the next one being made in `pool` while one is used; what making it raises comes in its place."""
    end: list[T] = []
    future = pool.submit(next, items, end)
    while (item := future.result()) is not end:
        future = pool.submit(next, items, end)
        yield item  # type: ignore[misc]


def cut_batches(rows: Iterable[object], most_rows: int) -> Iterator[list[object]]:
    """Consecutive runs of at most `most_rows` rows; a run ends with the row that fills `BATCH_CHARACTERS`."""
    batch: list[object] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row) if isinstance(row, str) else 0
        if len(batch) == most_rows or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def check_block_size(
    shards: Sequence[Shard],
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    boundary: tuple[int, int] | None = None,
    on_bad: OnBad = "raise",
    filters: Filters = FILTERS,
) -> None:
    """Refuse a corpus that cannot fill one sequence of block_size + 1 tokens, reading no further than needed.

    Raises:
        DataError: says how many tokens there are, after the filters.
    """
    plan = LanePlan(shards, lanes=1)
    start = plan.enter(0, epoch=0)
    tokens = 0
    reader = DocumentReader(shards, plan, tokenizer, boundary, on_bad, filters=filters)
    for document in reader.documents(0, start):
        if document.place.epoch > start.epoch:
            raise DataError(
                f"block_size={block_size} needs {block_size + 1} tokens and the data holds only {tokens}; "
                f"legal block sizes: 1 to {tokens - 1}"
            )
        tokens += len(document.tokens)
        if tokens > block_size:
            return


def dropped_summary(dropped: Mapping[str, int]) -> str:
    """Rows dropped by reason, for a message."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items())) or "none"
