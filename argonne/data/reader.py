"""The documents of one lane, in order, read and tokenised only as far as they are asked for."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from argonne.data.documents import UNREADABLE, TokenIds, tokenise_rows
from argonne.data.encoder import batch_rows, shared_encoder
from argonne.data.errors import DataError
from argonne.data.shards import OnBad, Shard, read_texts
from argonne.data.units import LanePlan, Place, Unit

# Lanes that share a split row group start on its parts at about the same time; each keeps its own part.
RECENT_ROW_GROUPS = 4
# Text tokenised at a time: some documents are megabytes, and their encodings many times as large.
BATCH_CHARACTERS = 1 << 20


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


class DocumentReader:
    """Reads any lane from any place. Holds the few row groups that were read last.

    Args:
        on_bad: "raise" stops at a row group that cannot be read; "skip" passes over its rows, counts them as
            "unreadable" and goes on. Each lane decides from the files alone, so that no layout changes a sample.
        report: is given one line for each row group that is passed over, once.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        plan: LanePlan,
        tokenizer: PreTrainedTokenizerFast,
        boundary: tuple[int, int] | None,
        on_bad: OnBad = "raise",
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.plan = plan
        self._shards = shards
        self._on_bad = on_bad
        self._report = report
        self._failed: set[tuple[int, int]] = set()
        self._encode = shared_encoder(tokenizer)
        self._boundary = boundary
        self._batch_rows = batch_rows()
        self._texts = functools.lru_cache(maxsize=RECENT_ROW_GROUPS)(
            lambda shard, row_group: read_texts(shards[shard], row_group)
        )

    def documents(self, lane: int, place: Place, unreadable: Sequence[tuple[int, int]] = ()) -> Iterator[Document]:
        """The lane's documents from `place` on, epoch after epoch, without end.

        What the lane found `unreadable` before is not tried again, whatever it is by now: a lane that goes on
        delivers what it would have delivered without the stop.

        Raises:
            DataError: a row group cannot be read, or the lane went once through the whole corpus
                (as many epochs as there are lanes) and every row was dropped.
        """
        lanes = self.plan.lanes
        productive = place.epoch - (self.plan.enter(lane, place.epoch) == place)
        dropped: Counter[str] = Counter()
        known, met = set(unreadable), []
        while place.epoch - productive <= lanes:
            unit = self.plan.units[place.unit]
            row_group = (unit.shard, unit.row_group)
            if row_group not in known and not self._readable(*row_group):
                known.add(row_group)
                met.append(row_group)
            if row_group in known:
                dropped[UNREADABLE] += unit.end - place.row
                place = self.plan.next_unit(lane, place)
                continue
            for row, outcome in self._outcomes(unit, place.row):
                if isinstance(outcome, str):
                    dropped[outcome] += 1
                    continue
                yield Document(Place(place.epoch, place.unit, row), outcome, dropped, tuple(met))
                dropped, met = Counter(), []
                productive = place.epoch
            place = self.plan.next_unit(lane, place)
        raise DataError(f"no usable documents in the data; rows dropped: {dropped_summary(dropped)}")

    def _readable(self, shard: int, row_group: int) -> bool:
        """Whether the row group can be read; a failure is remembered. Raises DataError if that is to stop the run."""
        if (shard, row_group) in self._failed:
            return False
        try:
            self._texts(shard, row_group)
        except DataError as error:
            if self._on_bad == "raise":
                raise
            self._failed.add((shard, row_group))
            if self._report is not None:
                rows = self._shards[shard].rows[row_group]
                self._report(f"{error}; its {rows:,} rows are passed over (--on-bad-shard skip)")
            return False
        return True

    def _outcomes(self, unit: Unit, first: int) -> Iterator[tuple[int, TokenIds | str]]:
        rows = self._texts(unit.shard, unit.row_group)[first : unit.end]
        row = first
        for batch in cut_batches(rows, self._batch_rows):
            yield from enumerate(tokenise_rows(batch, self._encode, self._boundary), row)
            row += len(batch)


def cut_batches(rows: Sequence[object], most_rows: int) -> Iterator[list[object]]:
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
) -> None:
    """Refuse a corpus that cannot fill one sequence of block_size + 1 tokens, reading no further than needed.

    Raises:
        DataError: says how many tokens there are, after the filters.
    """
    plan = LanePlan(shards, lanes=1)
    start = plan.enter(0, epoch=0)
    tokens = 0
    for document in DocumentReader(shards, plan, tokenizer, boundary, on_bad).documents(0, start):
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
