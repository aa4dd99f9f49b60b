"""Files of JSON lines: their rows are counted once, and compressed ones are decoded as streams, in order.

A compressed file cannot be entered in its middle. Whoever reads its row groups in about their order goes on with the
stream that is nearest before, and what is passed over is handed out, to be kept for those who come for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from argonne.data.corpus.lines import Column, Lines, group_at, groups
from argonne.data.corpus.location import Location, open_source
from argonne.data.errors import DataError

MOST_STREAMS = 8
"""Streams that are kept open: lanes that are far apart go on with one each."""
MOST_NAMES = 20

Key = tuple[str, int, int]
"""Path, size and time of change."""

_counts: dict[Key, tuple[int, ...]] = {}


def count_rows(
    location: Location, size: int, compression: str | None, column: Column, whole: bool = True
) -> tuple[int, ...]:
    """The rows of each row group, the file being read from one end to the other, its checksums with it.

    Args:
        whole: False looks no further than the first row that has what ``column`` names, and tells of these row groups.

    Raises:
        DataError: no line of the file has what ``column`` names.
    """
    key = _key(location, size)
    known = _counts.get(key)
    found: list[int] = []
    usable, first = False, None
    with opened(location, compression) as source:
        for data in groups(source):
            lines = Lines(data, column)
            found.append(len(lines))
            usable = usable or _has_column(lines)
            first = first or (lines if len(lines) else None)
            if usable and (known or not whole):
                return known or tuple(found)
    if first is not None and not usable:
        raise _without_column(location, first, column)
    _counts[key] = tuple(found)
    return _counts[key]


def remember(location: Location, size: int, rows: tuple[int, ...]) -> None:
    """Take these as the rows of a file of that size, which another process has counted."""
    with contextlib.suppress(OSError):
        if isinstance(location, Path) and os.stat(location).st_size == size:
            _counts[_key(location, size)] = rows


@dataclass
class _Stream:
    """A compressed file that has been read up to a row group."""

    key: Key
    number: int
    """The row group that comes next."""
    source: Any
    groups: Iterator[bytes]


class Streams:
    """Row groups of compressed files; several threads may ask."""

    def __init__(self) -> None:
        self._idle: list[_Stream] = []
        self._failed: dict[Key, tuple[int, str]] = {}
        self._lock = threading.Lock()

    def read(
        self, location: Location, size: int, compression: str, number: int, passed: Callable[[int, bytes], None]
    ) -> bytes:
        """The bytes of one row group; ``passed`` is given the number and bytes of each that comes before it here.

        Raises:
            OSError: the file is damaged there or before.
        """
        key = _key(location, size)
        with self._lock:
            at, reason = self._failed.get(key, (number + 1, ""))
            if number >= at:
                raise OSError(reason)
            before = [each for each in self._idle if each.key == key and each.number <= number]
            nearest = max(before, key=lambda each: each.number, default=None)
            if nearest is not None:
                self._idle.remove(nearest)
        if nearest is None:
            source = opened(location, compression)
            nearest = _Stream(key, 0, source, groups(source))
        try:
            while True:
                data = next(nearest.groups, b"")
                nearest.number += 1
                if nearest.number > number:
                    break
                passed(nearest.number - 1, data)
        except Exception as error:
            nearest.source.close()
            self._failed[key] = nearest.number, str(error)
            raise
        with self._lock:
            self._idle.append(nearest)
            gone = self._idle[:-MOST_STREAMS]
            del self._idle[:-MOST_STREAMS]
        for stream in gone:
            stream.source.close()
        return data


STREAMS = Streams()
"""Those of this process."""


def read_lines(
    location: Location,
    size: int,
    compression: str | None,
    number: int,
    column: Column,
    passed: Callable[[int, Lines], None] | None = None,
) -> Lines:
    """One row group; ``passed`` is given those that were decoded on the way."""
    if compression is None:
        with open_source(location) as source:
            return Lines(group_at(source, number), column)

    def hand_out(before: int, data: bytes) -> None:
        if passed is not None:
            passed(before, Lines(data, column))

    return Lines(STREAMS.read(location, size, compression, number, hand_out), column)


def opened(location: Location, compression: str | None) -> Any:
    """The lines of a file, decompressed."""
    source = open_source(location)
    if compression is None:
        return source
    return pa.CompressedInputStream(pa.BufferedInputStream(source, 1 << 20), compression)


def _key(location: Location, size: int) -> Key:
    changed = os.stat(location).st_mtime_ns if isinstance(location, Path) else 0
    return str(location), size, changed


def _has_column(lines: Lines) -> bool:
    """Whether any row is a text, or has one of the columns."""
    rows = (row for number in range(len(lines)) for row in lines.rows(number, number + 1))
    return any(isinstance(row, str) or (isinstance(row, dict) and row) for row in rows)


def _without_column(location: Location, first: Lines, column: Column) -> DataError:
    what = f"a string {column!r}" if isinstance(column, str) else f"any of {', '.join(map(repr, column))}"
    names = ", ".join(" ".join(name.split())[:60] for name in first.names(0)[:MOST_NAMES])
    has = f"the first has: {names}" if names else "the first is no JSON object"
    return DataError(f"shard {location} has no line that is a JSON object with {what}; {has}")
