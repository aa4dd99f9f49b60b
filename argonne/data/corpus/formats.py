"""The formats of shards: Parquet, the Arrow file format, the Arrow stream format, and JSON lines.

Files may be damaged anywhere. Whatever pyarrow makes of that becomes a DataError, and what it would take for
good (it checks neither a footer's counts nor an Arrow array's offsets) is checked here before it is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from argonne.data.corpus.line_files import count_rows, read_lines
from argonne.data.corpus.lines import BOM, Column, Lines
from argonne.data.corpus.location import LINES, Location, open_source
from argonne.data.corpus.pages import page_fault
from argonne.data.corpus.records import BYTES, Records, as_bytes
from argonne.data.errors import DataError, one_line
from argonne.parallel.errors import ArgonneError

TEXT = "text"
"""The column of texts, unless another is named."""
STREAM_BUFFER = 1 << 20

# Of a schema, in a message.
MOST_COLUMNS, MOST_CHARACTERS = 20, 60

Format = Literal["Parquet file", "Arrow file", "Arrow stream", "JSON lines", "JSON lines, gzip", "JSON lines, zstd"]
# A stream starts with the marker that precedes every message.
_MAGIC: dict[bytes, Format] = {
    b"PAR1": "Parquet file",
    b"ARROW1": "Arrow file",
    b"\xff\xff\xff\xff": "Arrow stream",
}
# JSON lines have no marker of their own: those of compressed ones, and the names that say the same.
COMPRESSIONS: dict[Format, str | None] = {"JSON lines": None, "JSON lines, gzip": "gzip", "JSON lines, zstd": "zstd"}
_COMPRESSED: dict[bytes, tuple[str, Format]] = {
    b"\x1f\x8b": (".jsonl.gz", "JSON lines, gzip"),
    b"\x28\xb5\x2f\xfd": (".jsonl.zst", "JSON lines, zstd"),
}
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever fails within becomes a DataError that names `what`."""
    try:
        yield
    except ArgonneError:
        raise
    except Exception as error:  # damage surfaces as any of a dozen types, SystemError and MemoryError among them
        raise DataError(f"{what} cannot be read: {one_line(error)}") from error


def inspect(location: Location, column: Column = TEXT, whole: bool = True) -> tuple[Format, int, tuple[int, ...]]:
    """Format, size in bytes, and the rows of each row group or record batch; of what has an index, no text is read.

    With ``whole=False`` JSON lines, which have none, are not read further than their first usable row.

    Raises:
        DataError: it is no shard, cannot be read, or has no column of text called `column` (none of several).
    """
    with reading(f"shard {location}"):
        with open_source(location) as source:
            size: int = source.size()
            kind = _format(location, source.read(8))
            if kind == "Parquet file":
                source.seek(0)
                with pq.ParquetFile(source) as parquet:
                    _columns_of(location, parquet.schema_arrow, column)
                    return kind, size, _parquet_rows(location, parquet.metadata)
        if kind in COMPRESSIONS:
            return kind, size, count_rows(location, size, COMPRESSIONS[kind], column, whole)
        with open_source(location, mapped=True) as source:
            reader = _arrow_reader(location, kind, source, column)
            # Arrow lists no row counts, so all messages are walked; being mapped, hardly a byte is read.
            rows = tuple(batch.num_rows for batch in _batches(reader))
            if kind == "Arrow stream":
                _check_end(location, source)
            return kind, size, rows


class Texts:
    """Texts as Arrow holds them, checked and not yet decoded to Python."""

    def __init__(self, arrays: Sequence[pa.Array]) -> None:
        for array in arrays:
            # Offsets that point outside the data would end the process. Arrow checks them when asked to, but
            # refuses an array for one bad text: as plain bytes it passes.
            as_bytes(array).validate(full=True)
        self._arrays = arrays

    def __len__(self) -> int:
        return sum(map(len, self._arrays))

    @property
    def nbytes(self) -> int:
        """Bytes in memory, or mapped."""
        return sum(array.nbytes for array in self._arrays)

    def rows(self, first: int, end: int) -> list[object]:
        """The rows from `first` to `end`: `str`, or None where a text is null or not valid UTF-8."""
        found: list[object] = []
        begin = 0
        for array in self._arrays:
            if begin < end and first < begin + len(array):
                start = max(first - begin, 0)
                found += _strings(array.slice(start, end - begin - start))
            begin += len(array)
        return found


Rows = Texts | Records | Lines
"""Of a row group, not yet decoded to Python."""


def read_column(
    location: Location,
    kind: Format,
    size: int,
    row_group: int,
    column: Column = TEXT,
) -> Rows:
    """The rows of one row group, where the file still has `size` bytes; see `open_texts`."""
    where = f"row group {row_group} of shard {location}"
    with reading(where), open_source(location, mapped=kind != "Parquet file") as source:
        _check_size(where, source, size)
        if kind in COMPRESSIONS:
            return read_lines(location, size, COMPRESSIONS[kind], row_group, column)
        if kind != "Parquet file":
            reader = _arrow_reader(location, kind, source, column)
            return _rows(list(_batches(reader, row_group)), column)
        with pq.ParquetFile(source, page_checksum_verification=True) as parquet:
            names = _columns_of(location, parquet.schema_arrow, column)
            table = parquet.read_row_group(row_group, columns=names)
            if isinstance(column, tuple):
                return Records(table.to_batches())
            texts = table.column(column)
            _check_chunk(where, source, parquet.metadata, row_group, column, len(texts), texts.null_count)
            return Texts(texts.chunks)


def stream_column(location: Location, size: int, row_group: int, rows: int, column: Column = TEXT) -> Iterator[Rows]:
    """The rows of one row group of a Parquet file, `rows` at a time: a few pages of it are in memory."""
    where = f"row group {row_group} of shard {location}"
    with reading(where), open_source(location) as source:
        _check_size(where, source, size)
        read = nulls = 0
        with pq.ParquetFile(
            source, page_checksum_verification=True, buffer_size=STREAM_BUFFER, pre_buffer=False
        ) as parquet:
            names = _columns_of(location, parquet.schema_arrow, column)
            for batch in parquet.iter_batches(rows, row_groups=[row_group], columns=names, use_threads=False):
                if isinstance(column, str):
                    texts = batch.column(column)
                    read, nulls = read + len(texts), nulls + texts.null_count
                yield _rows([batch], column)
            if isinstance(column, str):
                _check_chunk(where, source, parquet.metadata, row_group, column, read, nulls)


def _rows(batches: Sequence[pa.RecordBatch], column: Column) -> Texts | Records:
    return Records(batches) if isinstance(column, tuple) else Texts([batch.column(column) for batch in batches])


def _check_size(where: str, source: pa.NativeFile, size: int) -> None:
    if source.size() != size:
        raise DataError(f"{where}: the file has {source.size():,} bytes, not {size:,}: the file was changed")


def _format(location: Location, head: bytes) -> Format:
    if not head:
        raise DataError(f"shard {location} is empty (0 bytes)")
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    for magic, (suffix, compressed) in _COMPRESSED.items():
        if head.startswith(magic) or location.name.endswith(suffix):
            return compressed
    if location.name.endswith(f".{LINES[0]}") or head.removeprefix(BOM.encode()).lstrip().startswith(b"{"):
        return "JSON lines"
    kinds = ", ".join([*_MAGIC.values(), "JSON lines"])
    raise DataError(f"shard {location} starts with {head!r}; expected the content of a {kinds}")


def _columns_of(location: Location, schema: pa.Schema, column: Column) -> list[str]:
    """The columns to be read; raises DataError where there is none, or none of strings where texts are asked for."""
    if isinstance(column, tuple):
        names = [name for name in column if name in schema.names]
        if not names:
            none = f"none of the columns {', '.join(map(repr, column))}"
            raise DataError(f"shard {location} has {none}; its columns: {_columns(schema)}")
        return names
    found = schema.get_all_field_indices(column)
    if len(found) > 1:
        raise DataError(
            f"shard {location} has {len(found)} columns {column!r}; legal: one. Its columns: {_columns(schema)}"
        )
    kind = schema.field(found[0]).type if found else None
    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    if kind not in BYTES:
        other = f"; {column!r} is {_short(kind)}" if found else ""
        raise DataError(f"shard {location} has no string column {column!r}{other}; its columns: {_columns(schema)}")
    return [column]


def _columns(schema: pa.Schema) -> str:
    """The columns and their types, on one line: names may be anything, and there may be thousands."""
    listed = [f"{_short(field.name)} ({_short(field.type)})" for field in itertools.islice(schema, MOST_COLUMNS)]
    more = [f"and {len(schema) - MOST_COLUMNS} more"] if len(schema) > MOST_COLUMNS else []
    return ", ".join([*listed, *more]) or "none"


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def _parquet_rows(location: Location, metadata: Any) -> tuple[int, ...]:
    """The row counts, once the footer agrees with itself: it has no checksum of its own.

    Columns are left alone: asking for one whose description is damaged ends the process (pyarrow 26).
    """
    rows = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    if sum(rows) != metadata.num_rows or any(count < 0 for count in rows):
        total = f"{metadata.num_rows:,} rows in all and {sum(rows):,} in its row groups"
        raise DataError(f"shard {location} cannot be read: its footer counts {total}")
    return rows


def _check_chunk(
    where: str, source: pa.NativeFile, metadata: Any, row_group: int, column: str, rows: int, nulls: int
) -> None:
    """Compare what was read with the statistics and the page headers: a damaged header can turn texts into nulls.

    To be called once the column was read without fault; see `_parquet_rows`.
    """
    paths = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
    chunk = metadata.row_group(row_group).column(paths.index(column))
    if chunk.physical_type != "BYTE_ARRAY":  # asking for statistics of another type ends the process, too
        raise DataError(f"{where} cannot be read: its footer says that the texts are {chunk.physical_type}")
    statistics = chunk.statistics
    if statistics is not None and statistics.has_null_count and statistics.null_count != nulls:
        told = f"not the {statistics.null_count:,} of its statistics"
        raise DataError(f"{where} cannot be read: {nulls:,} null rows, {told}")
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset > 0:
        start = min(start, chunk.dictionary_page_offset)
    if fault := page_fault(source, start, rows, nulls):
        raise DataError(f"{where} cannot be read: {fault}")


def _arrow_reader(location: Location, kind: Format, source: pa.NativeFile, column: Column) -> Any:
    """A reader of the columns that are asked for alone."""
    connect = ipc.open_file if kind == "Arrow file" else ipc.open_stream
    schema = connect(source).schema
    wanted = [schema.get_field_index(name) for name in _columns_of(location, schema, column)]
    source.seek(0)
    return connect(source, options=ipc.IpcReadOptions(included_fields=wanted))


def _batches(reader: Any, only: int | None = None) -> Iterator[pa.RecordBatch]:
    """All record batches, or just number `only`."""
    if isinstance(reader, ipc.RecordBatchFileReader):
        numbers = range(reader.num_record_batches) if only is None else [only]
        return (reader.get_batch(number) for number in numbers)
    # A stream has no index: the messages before the one wanted are passed over.
    return iter(reader) if only is None else itertools.islice(reader, only, only + 1)


def _check_end(location: Location, source: pa.NativeFile) -> None:
    """A stream says nowhere how many batches it has: one cut off between two of them lacks its end marker."""
    end, size = source.tell(), source.size()
    source.seek(max(0, size - len(_END_OF_STREAM)))
    if end != size or source.read() != _END_OF_STREAM:
        raise DataError(
            f"shard {location} cannot be read: the stream ends at byte {end:,} of {size:,}, or has no end marker"
        )


def _strings(array: pa.Array) -> list[object]:
    try:
        texts = array.to_pylist()
    except UnicodeDecodeError:
        texts = as_bytes(array).to_pylist()
    return [_decode(text) if isinstance(text, bytes) else text for text in texts]


def _decode(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None
