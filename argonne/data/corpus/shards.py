"""The shards of a corpus: finding, opening and reading them, and setting aside those that cannot be read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from argonne.data.corpus.formats import TEXT, Format, Rows, inspect, read_column, stream_column
from argonne.data.corpus.lines import Column
from argonne.data.corpus.location import Location, Url, expand, is_url
from argonne.data.errors import DataError

DEFAULT_GLOBS = (
    "../data/CC-MAIN-2025-26/*.parquet",
    "data/CC-MAIN-2025-26/*.parquet",
    "../data/*.arrow",
    "data/*.arrow",
)

OnBad = Literal["raise", "skip"]


@dataclass(frozen=True)
class Shard:
    """One file of the corpus: its row counts are known, its text is not yet read."""

    path: Location
    rows: tuple[int, ...]
    """Rows of each Parquet row group, Arrow record batch or stretch of JSON lines, in file order."""
    size: int
    """Bytes on disk."""
    format: Format | None
    """None for a shard that is quarantined."""
    unreadable: str = ""
    """Why the shard as a whole is quarantined: none of its rows can be had. Empty for a good shard."""
    column: Column = TEXT
    """The column that holds its texts; or several, of which its rows are dicts."""


def find_shards(patterns: Sequence[str] = ()) -> tuple[Location, ...]:
    """The files that `patterns` (paths, globs, directories, or URLs of these) name together, each once.

    They come in natural numeric order of their base names (`part-2` before `part-10`), then of their paths.
    Without patterns, the first of `DEFAULT_GLOBS` that matches anything is taken, alone.

    Raises:
        DataError: nothing matches, or a URL cannot be used.
    """
    attempts = [list(patterns)] if patterns else [[default] for default in DEFAULT_GLOBS]
    for attempt in attempts:
        found = {_identity(path): path for pattern in attempt for path in expand(pattern)}
        if found:
            return tuple(sorted(found.values(), key=canonical))
    tried = [pattern for attempt in attempts for pattern in attempt]
    empty = [pattern for pattern in tried if not is_url(pattern) and os.path.isdir(os.path.expanduser(pattern))]
    endings = "those ending in .parquet or .arrow are taken, else those in .jsonl, .jsonl.gz or .jsonl.zst"
    listed = f"; in a directory ({empty[0]}) {endings}" if empty else ""
    raise DataError(f"no data shards match {', '.join(tried)}; a shard is a Parquet, Arrow or JSONL file{listed}")


def matching_default() -> list[str] | None:
    """The default glob that `find_shards` takes without patterns; None where none of them matches anything."""
    return next(([pattern] for pattern in DEFAULT_GLOBS if expand(pattern)), None)


def open_shards(
    paths: Sequence[Location], on_bad: OnBad = "raise", column: Column = TEXT, whole: bool = True
) -> tuple[Shard, ...]:
    """Read the footers of all `paths`, in the given order; no text is read, but of JSON lines, which are counted.

    With `on_bad="skip"` a file that cannot be opened keeps its place, quarantined and without rows. With
    `whole=False` a shard of JSON lines has the row groups up to its first usable row alone.

    Raises:
        DataError: a file is no shard, cannot be read, has no rows, or no string column `column` (none of several);
            with "skip", when this is so of every file.
    """
    opened = open_shard if on_bad == "raise" else open_or_quarantine
    return require_rows([opened(path, column, whole) for path in paths])


def open_shard(path: Location, column: Column = TEXT, whole: bool = True) -> Shard:
    """Read the footer of one shard; see `open_shards`."""
    kind, size, rows = inspect(path, column, whole)
    if not sum(rows):
        raise DataError(f"shard {path} has no rows; leave it out of the glob")
    return Shard(path, rows, size, kind, column=column)


def open_or_quarantine(path: Location, column: Column = TEXT, whole: bool = True) -> Shard:
    """The shard, or where it cannot be opened one without rows that says why."""
    try:
        return open_shard(path, column, whole)
    except DataError as error:
        return Shard(path, (), 0, None, str(error).removeprefix(f"shard {path} "), column)


def quarantined(shards: Sequence[Shard]) -> dict[int, str]:
    """Why, for the index of each shard that is quarantined as a whole."""
    return {index: shard.unreadable for index, shard in enumerate(shards) if shard.unreadable}


def quarantine(shards: Sequence[Shard], reasons: Mapping[int, str], keep_rows: bool = False) -> tuple[Shard, ...]:
    """The shards with those at the indices in `reasons` quarantined: what every rank makes of the union of all ranks'.

    Args:
        shards: as opened here.
        reasons: the union of what `quarantined` says on each rank.
        keep_rows: their row counts are known from a listing and stay, so that lanes keep their ways.

    Raises:
        DataError: no shard is left.
    """
    changed = list(shards)
    for index, reason in reasons.items():
        kept = changed[index] if keep_rows else replace(changed[index], rows=(), size=0)
        changed[index] = replace(kept, format=None, unreadable=reason)
    return require_rows(changed)


def require_rows(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """The shards; raises DataError where every one of them is quarantined."""
    if shards and all(shard.unreadable for shard in shards):
        first = shards[0]
        raise DataError(f"none of the {len(shards)} data shards can be read; shard {first.path} {first.unreadable}")
    return tuple(shards)


def read_texts(shard: Shard, row_group: int) -> list[object]:
    """The text of every row of one row group: `str`, or None where it is null or not valid UTF-8; or its columns.

    Of a shard that was opened for several columns each row is a dict of those that it has. A line that is no JSON
    object is `BROKEN`, as is a row of several columns with a text that is no valid UTF-8.

    Raises:
        DataError: the row group cannot be read, fails its checksum, or is not the one that was opened.
    """
    return open_texts(shard, row_group).rows(0, shard.rows[row_group])


def open_texts(shard: Shard, row_group: int) -> Rows:
    """The rows of one row group, not yet decoded to Python; see `read_texts`."""
    kind = _require_readable(shard, row_group)
    texts = read_column(shard.path, kind, shard.size, row_group, shard.column)
    _require_rows_of(shard, row_group, len(texts))
    return texts


def stream_texts(shard: Shard, row_group: int, rows: int) -> Iterator[Rows]:
    """The rows of one row group of a Parquet file, `rows` at a time: a few pages of it are in memory.

    Raises:
        DataError: as `read_texts`, but when the fault is come upon: rows before it have been handed out.
    """
    _require_readable(shard, row_group)
    read = 0
    for texts in stream_column(shard.path, shard.size, row_group, rows, shard.column):
        read += len(texts)
        yield texts
    _require_rows_of(shard, row_group, read)


def _require_readable(shard: Shard, row_group: int) -> Format:
    if shard.unreadable or shard.format is None:
        where = f"row group {row_group} of shard {shard.path}"
        raise DataError(f"{where} cannot be read: the shard {shard.unreadable}")
    return shard.format


def _require_rows_of(shard: Shard, row_group: int, rows: int) -> None:
    if rows != shard.rows[row_group]:
        where = f"row group {row_group} of shard {shard.path}"
        raise DataError(f"{where} has {rows} rows, not {shard.rows[row_group]}: the file was changed")


def fingerprint(shards: Sequence[Shard]) -> str:
    """A SHA-256 (hex) of each shard's base name, size and row counts, in order.

    Directories and times are left out: a copy of the corpus is the same corpus.
    """
    described = [[shard.path.name, shard.size, shard.rows] for shard in shards]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def canonical(path: Location) -> tuple[list[str | int], str]:
    """The key by which shards are sorted: their base names with numbers as numbers, then their paths."""
    # Splitting on digits alternates text and number, so that keys always compare like with like.
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], str(path)


def _identity(path: Location) -> str:
    return str(path) if isinstance(path, Url) else os.path.abspath(path)
