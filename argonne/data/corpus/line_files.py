"""Files of JSON lines: their rows are counted once, and compressed ones are decoded once, from their beginning.

A compressed file cannot be entered in its middle, and lanes are in many places of it. So what is decoded on the way is
kept in a temporary file, each row group compressed for itself.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pyarrow as pa

from argonne.data.corpus.lines import Column, Lines, group_at, groups
from argonne.data.corpus.location import Location, open_source
from argonne.data.errors import DataError
from argonne.parallel.errors import ArgonneError

MOST_FILES, MOST_BYTES = 128, 4 << 30
"""Compressed files that are kept decoded, and what they may take on the disk; the one in use always is."""
_CODEC = "zstd"
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


class _Decoded:
    """A compressed file as far as it was decoded: each row group for itself in a file that has no name."""

    def __init__(self, location: Location, compression: str) -> None:
        self._source = opened(location, compression)
        self._groups = groups(self._source)
        self._file = tempfile.TemporaryFile(prefix="argonne-", buffering=0)  # noqa: SIM115
        self._places: list[tuple[int, int, int]] = []
        self._lock = threading.Lock()
        self._fault = ""
        self.bytes = 0
        """On the disk."""

    def read(self, number: int) -> bytes:
        """The bytes of one row group. Raises OSError where the file is damaged before its end."""
        with self._lock:
            while number >= len(self._places):
                self._decode()
            at, length, size = self._places[number]
            packed = os.pread(self._file.fileno(), length, at)
        return bytes(pa.decompress(packed, size, _CODEC, asbytes=True))

    def _decode(self) -> None:
        if self._fault:
            raise OSError(self._fault)
        try:
            data = next(self._groups, None)
        except OSError as error:
            self._fault = str(error)
            raise
        if data is None:
            raise OSError("the file ends before it")
        packed = pa.compress(data, _CODEC, asbytes=True)
        try:
            os.pwrite(self._file.fileno(), packed, self.bytes)
        except OSError as error:
            folder = tempfile.gettempdir()
            raise ArgonneError(
                f"{folder} has no room for what is decompressed: {error}; legal: a larger TMPDIR"
            ) from error
        self._places.append((self.bytes, len(packed), len(data)))
        self.bytes += len(packed)


class DecodedFiles:
    """Compressed files that are read from, the last used ones; several threads may ask."""

    def __init__(self) -> None:
        self._files: OrderedDict[Key, _Decoded] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, location: Location, size: int, compression: str, number: int) -> bytes:
        """The bytes of one row group.

        Raises:
            OSError: the file is damaged there or before.
            ArgonneError: there is no room for what is decoded.
        """
        key = _key(location, size)
        with self._lock:
            if key not in self._files:
                self._files[key] = _Decoded(location, compression)
            self._files.move_to_end(key)
            file = self._files[key]
        data = file.read(number)
        with self._lock:
            while len(self._files) > 1 and (
                len(self._files) > MOST_FILES or sum(each.bytes for each in self._files.values()) > MOST_BYTES
            ):
                self._files.popitem(last=False)  # closed when the last who reads it lets it go
        return data


DECODED = DecodedFiles()
"""Those of this process."""


def read_lines(location: Location, size: int, compression: str | None, number: int, column: Column) -> Lines:
    """One row group."""
    if compression is not None:
        return Lines(DECODED.read(location, size, compression, number), column)
    with open_source(location) as source:
        return Lines(group_at(source, number), column)


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
