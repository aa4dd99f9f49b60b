"""A corpus tokenised once: its token ids in memory-mapped files, and where each document of them lies.

A cache is the directory ``<cache directory>/<key>``, the key being made of all that decides its content. It
holds two files for each unit, a run of whole row groups of one shard: ``<unit>.bin`` and, written after it,
``<unit>.json``, which tells its size and checksum. ``index.json``, written last, makes the cache complete.

``<unit>.bin`` is three little-endian arrays, one behind the other: the token ids of its documents end to end
(uint16 or uint32, then zeros up to a multiple of 8 bytes), for each document the tokens up to its end (int64),
and for each document its row, counted from the unit's first (int64).
"""

from __future__ import annotations

import functools
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from argonne.data.corpus.formats import TEXT
from argonne.data.corpus.shards import Shard, fingerprint
from argonne.data.errors import DataError, one_line
from argonne.data.lanes.packing import Packed
from argonne.data.tokens.filters import FILTERS, Filters
from argonne.data.tokens.tokenizer import tokenizer_fingerprint
from argonne.files import read_object, seal, write_json

FORMAT = 1
"""Raised whenever the same corpus and tokenizer would give other files."""
INDEX = "index.json"
# What a killed build loses is at most one unit per process; a corpus has about this many.
UNITS = 1024
MIN_UNIT_ROWS, MAX_UNIT_ROWS = 1 << 10, 1 << 16
# Each map holds a file descriptor, and a process may have 1024 of those by default.
OPEN_UNITS = 128
_READ = 1 << 22


@dataclass(frozen=True)
class UnitRange:
    """What a unit is made of: consecutive row groups of one shard."""

    shard: int
    """Index into the shards, in their canonical order."""
    first: int
    """Its first row group."""
    rows: tuple[int, ...]
    """The rows of each of its row groups."""

    @property
    def name(self) -> str:
        """The name of its files, without their suffixes."""
        return f"{self.shard:05d}-{self.first:06d}"


@dataclass(frozen=True)
class CachedUnit:
    """A unit as it lies in the cache."""

    span: UnitRange
    tokens: int
    documents: int
    dropped: Mapping[str, int]
    """Rows that are in no document, by reason."""
    unreadable: tuple[int, ...]
    """Row groups that could not be read; their rows are counted in `dropped`."""
    crc32: int
    """Of ``<unit>.bin``."""

    def size(self, token_bytes: int) -> int:
        """Bytes of ``<unit>.bin``."""
        return padded(self.tokens * token_bytes) + 16 * self.documents

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CachedUnit:
        """The inverse of `dataclasses.asdict`, by way of JSON."""
        span = UnitRange(**{**values["span"], "rows": tuple(values["span"]["rows"])})
        return cls(**{**values, "span": span, "unreadable": tuple(values["unreadable"])})


class TokenCache:
    """A complete cache, read as one circle of `tokens` tokens: all documents in canonical order, again and again.

    Canonical is the order of shards, row groups and rows. Files are mapped when they are first needed, and
    `OPEN_UNITS` of them stay so.
    """

    def __init__(self, path: Path, dtype: str, units: Sequence[CachedUnit]) -> None:
        self.path = path
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.units = tuple(units)
        self.tokens = sum(unit.tokens for unit in units)
        """Tokens of all documents, boundary tokens counted."""
        self.documents = sum(unit.documents for unit in units)
        self.dropped: Mapping[str, int] = dict(sum((Counter(unit.dropped) for unit in units), Counter()))
        """Rows that are in no document, by reason."""
        self._starts = np.array([0, *accumulate(unit.tokens for unit in units)], dtype=np.int64)
        self._mapped = functools.lru_cache(maxsize=OPEN_UNITS)(self._map)

    @property
    def fingerprint(self) -> str:
        """A SHA-256 (hex) of the content: equal for equal tokens, whoever built it and however often."""
        return seal([[unit.tokens, unit.documents, unit.crc32] for unit in self.units])

    def read(self, start: int, count: int) -> tuple[Packed, int]:
        """The `count` tokens from `start` on, and how many documents end with one of them.

        `start` counts from the beginning of the circle, `count` is at most `tokens`.

        Raises:
            DataError: a file cannot be opened any more.
        """
        taken = Packed(np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int32))
        filled = ended = 0
        while filled < count:
            index, begin = self._find((start + filled) % self.tokens)
            unit = self._mapped(index)
            end = min(begin + count - filled, self.units[index].tokens)
            piece = slice(filled, filled + end - begin)
            taken.tokens[piece] = unit.tokens[begin:end]
            first, last = np.searchsorted(unit.ends, (begin, end - 1), side="right").tolist()
            ends = np.minimum(unit.ends[first : last + 1], end)
            numbers = np.arange(ended, ended + len(ends), dtype=np.int32)
            taken.documents[piece] = np.repeat(numbers, np.diff(ends, prepend=begin))
            # Only the last piece of a sequence can stop within a document: no document is in two units.
            ended += last - first + int(unit.ends[last] == end)
            filled += end - begin
        return taken, ended

    def position(self, start: int) -> tuple[int, int, int, int]:
        """Shard, row group, row within that, and token within the document, of the token at `start`."""
        index, begin = self._find(start)
        unit, span = self._mapped(index), self.units[index].span
        document = int(np.searchsorted(unit.ends, begin, side="right"))
        row = int(unit.rows[document])
        group = bisect_right(unit.first_rows, row) - 1
        before = int(unit.ends[document - 1]) if document else 0
        return span.shard, span.first + group, row - unit.first_rows[group], begin - before

    def _find(self, start: int) -> tuple[int, int]:
        """The unit that holds a token, and the token's place in it."""
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        return index, start - int(self._starts[index])

    def _map(self, index: int) -> _Mapped:
        unit = self.units[index]
        path = self.path / f"{unit.span.name}.bin"
        size = unit.size(self.dtype.itemsize)
        try:
            content = np.asarray(np.memmap(path, dtype=np.uint8, mode="r", shape=(size,)))
        except (OSError, ValueError) as error:  # ValueError: the file is shorter
            raise DataError(f"token cache {self.path} cannot be read: {one_line(error)}") from error
        table = content[size - 16 * unit.documents :].view("<i8")
        tokens = content[: unit.tokens * self.dtype.itemsize].view(self.dtype)
        first_rows = [0, *accumulate(unit.span.rows)]
        return _Mapped(tokens, table[: unit.documents], table[unit.documents :], first_rows)


@dataclass(frozen=True)
class _Mapped:
    """The three arrays of a unit, and the first row of each of its row groups."""

    tokens: npt.NDArray[Any]
    ends: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    first_rows: list[int]


def open_cache(path: Path, verify: bool = False) -> TokenCache:
    """The complete cache at `path`, the size of every file checked; with `verify`, every checksum too.

    Checksums take reading the whole cache once; sizes take a second for thousands of files.

    Raises:
        DataError: the cache is not complete, or what is damaged; building it again mends that alone.
    """
    content = read_sealed(path / INDEX)
    if content is None or content.get("made_from", {}).get("format") != FORMAT:
        raise DataError(f"token cache {path} is not complete; it must be built first")
    cache = TokenCache(path, content["dtype"], [CachedUnit.from_dict(each) for each in content["units"]])
    for unit in cache.units:
        if not is_whole(path, unit, cache.dtype.itemsize, verify):
            raise DataError(f"{unit.span.name}.bin of token cache {path} is damaged; the cache must be built again")
    return cache


def made_from(
    shards: Sequence[Shard],
    tokenizer: PreTrainedTokenizerFast,
    boundary: tuple[int, int] | None,
    filters: Filters = FILTERS,
) -> dict[str, Any]:
    """All that decides the content of a cache, as JSON values. Where the shards lie does not."""
    other = sorted({shard.column for shard in shards} - {TEXT})  # a cache of the column `text` does not name it
    return {
        "format": FORMAT,
        "data": fingerprint(shards),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "boundary": None if boundary is None else list(boundary),
        "filters": asdict(filters),
        "unit_rows": _unit_rows(shards),
        **({"columns": other} if other else {}),
    }


def cache_key(made_from: Mapping[str, Any]) -> str:
    """The name of a cache's directory: 16 hexadecimal digits."""
    return seal(made_from)[:16]


def cut_spans(shards: Sequence[Shard]) -> tuple[UnitRange, ...]:
    """The corpus in order, cut into units: `UNITS` or so, of `MIN_UNIT_ROWS` to `MAX_UNIT_ROWS` rows.

    A row group stays whole however many rows it has, for it is decoded as a whole.
    """
    size = _unit_rows(shards)
    spans = []
    for index, shard in enumerate(shards):
        first, rows = 0, 0
        for group, count in enumerate(shard.rows):
            if rows and rows + count > size:
                spans.append(UnitRange(index, first, shard.rows[first:group]))
                first, rows = group, 0
            rows += count
        spans.append(UnitRange(index, first, shard.rows[first:]))
    return tuple(spans)


def is_whole(path: Path, unit: CachedUnit, token_bytes: int, verify: bool) -> bool:
    """Whether the file of `unit` has its size, and with `verify` its checksum."""
    file = path / f"{unit.span.name}.bin"
    try:
        if file.stat().st_size != unit.size(token_bytes):
            return False
        return not verify or _checksum(file) == unit.crc32
    except OSError:
        return False


def padded(size: int) -> int:
    """`size` bytes up to a multiple of 8, so that what follows may be mapped as int64."""
    return -(-size // 8) * 8


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its own SHA-256, through to the disk; the old file or the new one is there."""
    write_json(path, {"sha256": seal(content), **content})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None where there is no such file, or anything else in it."""
    try:
        content = read_object(path)
        return content if content.pop("sha256") == seal(content) else None
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes a DataError of one line of any error of the file system: a full disk, missing permissions."""
    try:
        yield
    except OSError as error:
        raise DataError(f"token cache {path} cannot be written: {one_line(error)}") from error


def _unit_rows(shards: Sequence[Shard]) -> int:
    total = sum(sum(shard.rows) for shard in shards)
    return min(max(total // UNITS, MIN_UNIT_ROWS), MAX_UNIT_ROWS)


def _checksum(file: Path) -> int:
    crc = 0
    with file.open("rb") as opened:
        while block := opened.read(_READ):
            crc = zlib.crc32(block, crc)
    return crc
