"""The texts of row groups, each decoded once for the lanes that share it, and in bounded memory however large."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from argonne.data.corpus.formats import COMPRESSIONS, Rows
from argonne.data.corpus.shards import OnBad, Shard, open_texts, stream_texts
from argonne.data.errors import DataError

# Lanes go through the row groups side by side, but not in step: these are enough for all of them at a time.
KEPT_BYTES = 64 << 20
# Decoded between two times at which Arrow is asked for memory that it keeps; what it gives back it must ask for again.
RELEASED_BYTES = 16 << 20
# Beyond this (on disk, all columns counted) a row group is read piece by piece, by each lane for itself.
STREAMED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows `first` to `end` (exclusive) of one row group."""

    shard: int
    row_group: int
    first: int
    end: int


class RowGroups:
    """Reads rows of a corpus; several threads may do so at a time.

    Args:
        shards: of the corpus.
        on_bad: "raise" stops at a row group that cannot be read; with "skip" it has no rows.
        report: is given one line for each row group that has none, once.
    """

    def __init__(self, shards: Sequence[Shard], on_bad: OnBad, report: Callable[[str], None] | None) -> None:
        self._shards, self._on_bad, self._report = shards, on_bad, report
        self._rows = [sum(shard.rows) for shard in shards]
        self._kept: OrderedDict[tuple[int, int], tuple[Rows, int]] = OrderedDict()
        self._kept_bytes = 0
        self._failed: set[tuple[int, int]] = set()
        self._streamed: set[tuple[int, int]] = set()
        self._lock = threading.RLock()
        self._most_bytes = STREAMED_BYTES
        self._decoded = 0

    def readable(self, shard: int, row_group: int) -> bool:
        """Whether the row group can be read; a failure is remembered. Raises DataError if that is to stop the run."""
        key = (shard, row_group)
        if key in self._failed:
            return False
        try:
            if not self._streams(shard, row_group):
                self._texts(shard, row_group)
            elif self._on_bad == "skip" and key not in self._streamed:
                # All of it before any of it: what a lane passes over does not depend on where it came in.
                for _ in stream_texts(self._shards[shard], row_group, 1 << 10):
                    pass
                self._streamed.add(key)
        except DataError as error:
            if self._on_bad == "raise":
                raise
            with self._lock:
                if self._report is not None and key not in self._failed:
                    rows = self._shards[shard].rows[row_group]
                    self._report(f"{error}; its {rows:,} rows are passed over (--on-bad-shard skip)")
                self._failed.add(key)
            return False
        return True

    def rows(self, unit: Unit, first: int, count: int) -> Iterator[object]:
        """The rows of a unit from row `first` of its row group on, `count` of them decoded at a time.

        Raises:
            DataError: the row group cannot be read.
        """
        if self._shards[unit.shard].format in COMPRESSIONS:
            # Held by the lane until it is through: finding the lines again would take longer than it saves.
            lines = self._texts(unit.shard, unit.row_group)
            for at in range(first, unit.end, count):
                yield from lines.rows(at, min(at + count, unit.end))
            return
        if not self._streams(unit.shard, unit.row_group):
            for at in range(first, unit.end, count):  # asked for each time: a lane that waits keeps nothing in memory
                yield from self._texts(unit.shard, unit.row_group).rows(at, min(at + count, unit.end))
            return
        begin = 0
        for texts in stream_texts(self._shards[unit.shard], unit.row_group, count):
            end = begin + len(texts)
            self._count_decoded(texts.nbytes)
            if end > first:
                yield from texts.rows(max(first - begin, 0), min(unit.end, end) - begin)
            if end >= unit.end:
                return
            begin = end

    def _streams(self, shard: int, row_group: int) -> bool:
        from_disk = self._shards[shard]
        share = from_disk.rows[row_group] / max(1, self._rows[shard])
        return from_disk.format == "Parquet file" and from_disk.size * share > self._most_bytes

    def _texts(self, shard: int, row_group: int) -> Rows:
        key = (shard, row_group)
        with self._lock:
            if key not in self._kept:
                texts = open_texts(self._shards[shard], row_group)
                self._kept[key] = texts, texts.nbytes
                self._kept_bytes += texts.nbytes
                while len(self._kept) > 1 and self._kept_bytes > KEPT_BYTES:
                    self._kept_bytes -= self._kept.popitem(last=False)[1][1]
                self._count_decoded(texts.nbytes)
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def _count_decoded(self, size: int) -> None:
        """Now and then have Arrow give back what it keeps for later: 40 MB in a hundred million tokens otherwise."""
        self._decoded += size
        if self._decoded > RELEASED_BYTES:
            pa.default_memory_pool().release_unused()
            self._decoded = 0
