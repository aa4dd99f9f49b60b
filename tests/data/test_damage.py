"""Shards with flipped bits, cut short, or with rows of every bad kind."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from argonne.data import (
    DataError,
    Encoder,
    open_shard,
    open_shards,
    read_texts,
)
from argonne.data.tokens.filters import tokenise_rows

PARQUET = list(itertools.product(["none", "snappy", "zstd"], [True, False], ["1.0", "2.0"]))
ARROW = list(itertools.product(["file", "stream"], [None, "lz4", "zstd"], [False, True]))
CASES = 20  # of each of these: 240 damaged files each


def texts(seed: int, groups: int = 3, rows: int = 12) -> list[list[str | None]]:
    source = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "", "zeta\u00e9"]
    return [
        [None if row % 7 == 3 else " ".join(source.choices(words, k=source.randint(0, 9))) for row in range(rows)]
        for _ in range(groups)
    ]


def columns(groups: list[list[str | None]]) -> pa.Table:
    rows = [row for group in groups for row in group]
    return pa.table({"id": range(len(rows)), "text": pa.array(rows, pa.string())})


def parquet_bytes(groups: list[list[str | None]], compression="none", dictionary=True, page="1.0", **more) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        columns(groups),
        sink,
        row_group_size=len(groups[0]),
        compression=compression,
        use_dictionary=dictionary,
        data_page_version=page,
        write_page_checksum=True,
        **{"data_page_size": 100, "write_batch_size": 4, **more},
    )
    return sink.getvalue().to_pybytes()


def arrow_bytes(groups: list[list[str | None]], kind: str, compression: str | None, dictionary: bool) -> bytes:
    table = columns(groups)
    if dictionary:
        table = table.set_column(1, "text", table["text"].dictionary_encode())
    sink = pa.BufferOutputStream()
    options = ipc.IpcWriteOptions(compression=compression)
    with {"file": ipc.new_file, "stream": ipc.new_stream}[kind](sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=len(groups[0]))
    return sink.getvalue().to_pybytes()


def damages(content: bytes, seed: str) -> list[tuple[str, bytes]]:
    """Three flips of one bit for each truncation, at random places."""
    source = random.Random(seed)
    found = []
    for case in range(CASES):
        if case % 4:
            found.append(flipped(content, source.randrange(8 * len(content))))
        else:
            length = source.randrange(len(content))
            found.append((f"cut to {length} of {len(content)} bytes", content[:length]))
    return found


def flipped(content: bytes, bit: int) -> tuple[str, bytes]:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return f"bit {bit} flipped", bytes(damaged)


def outcome(path: Path, content: bytes) -> list[list[object] | None] | None:
    """The texts of each row group, None for one that is refused; None alone where the file is."""
    path.write_bytes(content)
    try:
        shard = open_shard(path)
    except DataError as error:
        return named(error, f"shard {path}")
    found: list[list[object] | None] = []
    for row_group in range(len(shard.rows)):
        try:
            found.append(read_texts(shard, row_group))
        except DataError as error:
            found.append(named(error, f"row group {row_group} of shard {path}"))
    return found


def named(error: DataError, what: str) -> None:
    assert what in str(error)
    assert "\n" not in str(error)


def wrong(found: list[list[object] | None] | None, groups: list[list[str | None]]) -> bool:
    if found is None:
        return False
    return len(found) != len(groups) or any(
        each not in (None, group) for each, group in zip(found, groups, strict=True)
    )


@pytest.mark.parametrize(("compression", "dictionary", "page"), PARQUET)
def test_a_flipped_bit_or_a_truncation_of_parquet_with_checksums_never_gives_a_wrong_text(
    compression, dictionary, page, tmp_path: Path
) -> None:
    groups = texts(seed=1)
    content = parquet_bytes(groups, compression, dictionary, page)
    assert outcome(tmp_path / "shard", content) == groups
    refused = 0
    for what, damaged in damages(content, f"{compression} {dictionary} {page}"):
        found = outcome(tmp_path / "shard", damaged)
        assert not wrong(found, groups), what
        assert found is None or "cut" not in what, what
        refused += found != groups
    assert refused >= CASES // 3  # the rest hit the other column, or what nobody reads


@pytest.mark.slow  # every bit of a small file
@pytest.mark.parametrize(("page", "statistics"), [("1.0", True), ("2.0", False)])
def test_no_bit_of_parquets_headers_and_footer_which_have_no_checksums_changes_a_text_in_silence(
    page, statistics, tmp_path: Path
) -> None:
    groups = texts(seed=2, groups=2, rows=3)
    content = parquet_bytes(groups, "none", False, page, store_schema=False, write_statistics=statistics)
    survived = [
        what
        for bit in range(8 * len(content))
        for what, damaged in [flipped(content, bit)]
        if wrong(outcome(tmp_path / "shard", damaged), groups)
    ]
    assert survived == []


@pytest.mark.parametrize(("kind", "compression", "dictionary"), ARROW)
def test_damaged_arrow_is_refused_or_keeps_its_rows_and_never_ends_the_process(
    kind, compression, dictionary, tmp_path: Path
) -> None:
    groups = texts(seed=3)
    content = arrow_bytes(groups, kind, compression, dictionary)
    assert outcome(tmp_path / "shard", content) == groups
    for what, damaged in damages(content, f"{kind} {compression} {dictionary}"):
        found = outcome(tmp_path / "shard", damaged)
        assert found is None or "cut" not in what, what
        for rows in found or []:  # Arrow has no checksums: texts may differ
            assert rows is None or all(row is None or isinstance(row, str) for row in rows)


def test_offsets_outside_the_data_are_refused_before_they_are_followed(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 4, 1 << 30, 8], np.int32))
    bad = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"textmore")])
    for kind, new in (("file", ipc.new_file), ("stream", ipc.new_stream)):
        with new(tmp_path / kind, pa.schema([("text", pa.string())])) as writer:
            writer.write_batch(pa.record_batch([pa.array(["good"])], ["text"]))
            writer.write_batch(pa.record_batch([bad], ["text"]))
        shard = open_shard(tmp_path / kind)
        assert read_texts(shard, 0) == ["good"]
        with pytest.raises(DataError, match="row group 1 of .* cannot be read: "):
            read_texts(shard, 1)


def test_a_stream_cut_between_two_batches_is_refused(tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    writer = ipc.new_stream(sink, columns(texts(4)).schema)
    writer.write_table(columns(texts(4)), max_chunksize=12)
    path = tmp_path / "shard.arrow"
    with path.open("wb") as file:
        file.write(sink.getvalue().to_pybytes())  # the writer is not closed: all batches and no end
    with pytest.raises(DataError, match="has no end marker"):
        open_shard(path)


BAD_ROWS = [
    b"A good text, long enough for ten tokens to be found in it, surely.",
    None,
    b"\xff\xfe not UTF-8, \xc3(",
    b"",
    b"\xf0\x9f\x98\x80 some more text that is good and long enough to be kept.",
    b"w " * (1 << 16),
    b"\x00\x01 controls are characters like any other, and this is long enough.",
]


@pytest.mark.parametrize("column", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()], ids=str)
@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_a_row_group_of_every_bad_row_delivers_the_good_ones(kind, column, tmp_path: Path, tokenizer) -> None:
    large = column in (pa.large_string(), pa.large_binary())
    raw = pa.array(BAD_ROWS, pa.large_binary() if large else pa.binary())
    table = pa.table({"text": raw.view(column)})
    path = tmp_path / "shard"
    if kind == "parquet":
        pq.write_table(table, path, write_page_checksum=True)
    else:
        with {"file": ipc.new_file, "stream": ipc.new_stream}[kind](path, table.schema) as writer:
            writer.write_table(table)
    (shard,) = open_shards([path])
    rows = read_texts(shard, 0)
    assert [None if row is None else row.encode() for row in rows] == [*BAD_ROWS[:2], None, *BAD_ROWS[3:]]
    outcomes = tokenise_rows(rows, Encoder(tokenizer), None)
    reasons = [each if isinstance(each, str) else None for each in outcomes]
    assert reasons == [None, "not_text", "not_text", "empty", None, None, None]


@pytest.mark.parametrize(
    "values",
    [[1, 2], [1.5], [True], [["a"], ["b"]], [{"a": "b"}], pa.array([b"ab"], pa.binary(2)), pa.nulls(3)],
    ids=str,
)
def test_a_column_of_another_type_is_refused(values, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": values}), tmp_path / "shard")
    with pytest.raises(DataError, match="no string column 'text'; 'text' is .*; its columns: text \\("):
        open_shard(tmp_path / "shard")
