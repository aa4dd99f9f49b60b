"""Finding and reading the shards of a corpus: Parquet, the Arrow file format and the Arrow stream format."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from argonne.data.errors import DataError, one_line

DEFAULT_GLOBS = (
    "../data/CC-MAIN-2025-26/*.parquet",
    "data/CC-MAIN-2025-26/*.parquet",
    "../data/*.arrow",
    "data/*.arrow",
)
SUFFIXES = ("parquet", "arrow")
TEXT = "text"

Format = Literal["Parquet file", "Arrow file", "Arrow stream"]
# A stream starts with the marker that precedes every message.
_MAGIC: dict[bytes, Format] = {
    b"PAR1": "Parquet file",
    b"ARROW1": "Arrow file",
    b"\xff\xff\xff\xff": "Arrow stream",
}


@dataclass(frozen=True)
class Shard:
    """One file of the corpus: its row counts are known, its text is not yet read."""

    path: Path
    rows: tuple[int, ...]
    """Rows of each Parquet row group or Arrow record batch, in file order."""
    size: int
    """Bytes on disk."""
    format: Format


def find_shards(patterns: Sequence[str] = ()) -> tuple[Path, ...]:
    """The files that `patterns` (paths, globs or directories) name together, each once.

    They come in natural numeric order of their base names (`part-2` before `part-10`), then of their paths.
    Without patterns, the first of `DEFAULT_GLOBS` that matches anything is taken, alone.

    Raises:
        DataError: nothing matches.
    """
    attempts = [list(patterns)] if patterns else [[default] for default in DEFAULT_GLOBS]
    for attempt in attempts:
        found = {os.path.abspath(path): path for pattern in attempt for path in _expand(pattern)}
        if found:
            return tuple(sorted(found.values(), key=lambda path: (_natural(path.name), str(path))))
    tried = ", ".join(pattern for attempt in attempts for pattern in attempt)
    raise DataError(f"no data shards match {tried}; a shard is a Parquet or Arrow file")


def open_shards(paths: Sequence[Path]) -> tuple[Shard, ...]:
    """Read the footers of all `paths`, in the given order; no text is read.

    Raises:
        DataError: a file is no Parquet or Arrow file, cannot be read, has no rows or no string column `text`.
    """
    return tuple(open_shard(path) for path in paths)


def open_shard(path: Path) -> Shard:
    """Read the footer of one shard; see `open_shards`."""
    with _reading(f"shard {path}"):
        size = path.stat().st_size
        kind = _format(path)
        if kind == "Parquet file":
            with pq.ParquetFile(path) as parquet:
                _text_column(path, parquet.schema_arrow)
                metadata = parquet.metadata
                rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        else:
            with pa.memory_map(str(path)) as source:
                reader = _arrow_reader(path, kind, source)
                # Arrow lists no row counts, so all messages are walked; being mapped, hardly a byte is read.
                rows = tuple(batch.num_rows for batch in _batches(reader))
    if not sum(rows):
        raise DataError(f"shard {path} has no rows; remove it from the data glob")
    return Shard(path, rows, size, kind)


def read_texts(shard: Shard, row_group: int) -> list[object]:
    """The `text` of every row of one row group: `str`, or None where it is null or not valid UTF-8.

    Raises:
        DataError: the row group cannot be read, fails its checksum, or is not the one that was opened.
    """
    where = f"row group {row_group} of shard {shard.path}"
    with _reading(where):
        if shard.format == "Parquet file":
            with pq.ParquetFile(shard.path, page_checksum_verification=True) as parquet:
                texts = _strings(parquet.read_row_group(row_group, columns=[TEXT]).column(TEXT))
        else:
            with pa.memory_map(str(shard.path)) as source:
                reader = _arrow_reader(shard.path, shard.format, source)
                texts = [text for each in _batches(reader, row_group) for text in _strings(each.column(TEXT))]
    if len(texts) != shard.rows[row_group]:
        raise DataError(f"{where} has {len(texts)} rows, not {shard.rows[row_group]}: the file was changed")
    return texts


def fingerprint(shards: Sequence[Shard]) -> str:
    """A SHA-256 (hex) of each shard's base name, size and row counts, in order.

    Directories and times are left out: a copy of the corpus is the same corpus.
    """
    described = [[shard.path.name, shard.size, shard.rows] for shard in shards]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return [file for suffix in SUFFIXES for file in path.glob(f"*.{suffix}") if file.is_file()]
    if path.is_file():  # taken as it stands: a file name may hold the characters of a glob
        return [path]
    return [Path(file) for file in glob.glob(str(path), recursive=True) if os.path.isfile(file)]


def _natural(name: str) -> list[str | int]:
    # Splitting on digits alternates text and number, so that keys always compare like with like.
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", name))]


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{what} cannot be read: {one_line(error)}") from error


def _format(path: Path) -> Format:
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise DataError(f"shard {path} is empty (0 bytes)")
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    raise DataError(f"shard {path} starts with {head!r}; expected the content of a {', '.join(_MAGIC.values())}")


def _text_column(path: Path, schema: pa.Schema) -> int:
    """The index of the string column `text`; raises DataError where there is none."""
    index: int = schema.get_field_index(TEXT)
    kind = schema.field(index).type if index >= 0 else None
    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(f"shard {path} has no string column {TEXT!r}; its columns: {columns or 'none'}")
    return index


def _arrow_reader(path: Path, kind: Format, source: pa.NativeFile) -> Any:
    """A reader of the `text` column alone."""
    connect = ipc.open_file if kind == "Arrow file" else ipc.open_stream
    index = _text_column(path, connect(source).schema)
    source.seek(0)
    return connect(source, options=ipc.IpcReadOptions(included_fields=[index]))


def _batches(reader: Any, only: int | None = None) -> Iterator[pa.RecordBatch]:
    """All record batches, or just number `only`."""
    if isinstance(reader, ipc.RecordBatchFileReader):
        numbers = range(reader.num_record_batches) if only is None else [only]
        return (reader.get_batch(number) for number in numbers)
    # A stream has no index: the messages before the one wanted are passed over.
    return iter(reader) if only is None else itertools.islice(reader, only, only + 1)


def _strings(column: pa.Array | pa.ChunkedArray) -> list[object]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_decode(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _decode(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
