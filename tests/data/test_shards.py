from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from argonne.data import DEFAULT_GLOBS, DataError, find_shards, fingerprint, open_shards, read_texts
from argonne.parallel.errors import ArgonneError

KINDS = {"parquet": "Parquet file", "file": "Arrow file", "stream": "Arrow stream"}
GROUPS = [["one", None], ["three", "four", ""], ["six"]]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_shards([path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_come_in_natural_numeric_order_of_their_base_names(tmp_path: Path) -> None:
    touch(tmp_path, "b/part-2.arrow", "a/part-10.arrow", "a/part-1.arrow", "a/part-2.arrow", "c/000.arrow")
    found = find_shards([str(tmp_path / "*" / "*.arrow")])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "c/000.arrow",
        "a/part-1.arrow",
        "a/part-2.arrow",
        "b/part-2.arrow",
        "a/part-10.arrow",
    ]


@pytest.mark.parametrize("first", range(len(DEFAULT_GLOBS)))
def test_a_default_glob_is_tried_only_when_those_before_it_match_nothing(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for index, pattern in enumerate(DEFAULT_GLOBS[first:], start=first):
        touch(work, pattern.replace("*", f"from-{index}"))
    assert {path.stem for path in find_shards()} == {f"from-{first}"}


def test_a_users_glob_is_never_mixed_with_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "data/default.arrow", "mine/own.arrow")
    monkeypatch.chdir(tmp_path)
    assert names(find_shards(["mine/*.arrow"])) == ["own.arrow"]
    with pytest.raises(DataError, match=r"no data shards match nowhere/\*\.arrow"):
        find_shards(["nowhere/*.arrow"])


def test_several_patterns_are_united_and_duplicates_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "1.arrow", "2.parquet", "x[3].arrow")
    monkeypatch.chdir(tmp_path)
    patterns = ["*.arrow", "./1.arrow", str(tmp_path / "1.arrow"), "2.parquet", "x[3].arrow"]
    assert names(find_shards(patterns)) == ["1.arrow", "2.parquet", "x[3].arrow"]


def test_a_directory_stands_for_the_parquet_and_arrow_files_in_it(tmp_path: Path) -> None:
    touch(tmp_path, "2.parquet", "1.arrow", "readme.txt", "deeper/3.parquet")
    assert names(find_shards([str(tmp_path)])) == ["1.arrow", "2.parquet"]


def test_no_match_names_every_glob_that_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with pytest.raises(DataError) as caught:
        find_shards()
    assert all(pattern in str(caught.value) for pattern in DEFAULT_GLOBS)
    assert isinstance(caught.value, ArgonneError)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_its_row_counts_and_texts_whatever_its_suffix(kind, tmp_path, shard_to) -> None:
    path = tmp_path / "shard.data"
    shard_to(path, GROUPS, kind)
    (shard,) = open_shards([path])
    assert (shard.rows, shard.size, shard.format) == ((2, 3, 1), path.stat().st_size, KINDS[kind])
    assert [read_texts(shard, group) for group in (2, 0, 1)] == [GROUPS[2], GROUPS[0], GROUPS[1]]


TEXT_TYPES = [pa.large_string(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize(
    ("kind", "text_type"),
    # Parquet has no string views of its own.
    [(kind, text_type) for kind in KINDS for text_type in TEXT_TYPES]
    + [(kind, pa.string_view()) for kind in ("file", "stream")],
    ids=str,
)
def test_other_string_columns_read_like_plain_ones(kind, text_type, tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3], "text": pa.array(["b", None, "b"]).cast(text_type), "x": [0, 0, 0]})
    path = tmp_path / "shard"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with {"file": ipc.new_file, "stream": ipc.new_stream}[kind](path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (shard,) = open_shards([path])
    assert [read_texts(shard, group) for group in range(2)] == [["b", None], ["b"]]


@pytest.mark.parametrize("encoded", [False, True], ids=["plain", "dictionary"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_not_utf8_reads_as_none_for_that_row_alone(kind, encoded, tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe", None, "\u00e9".encode()], pa.binary())
    texts = raw.view(pa.string())
    table = pa.table({"text": texts.dictionary_encode() if encoded else texts})
    path = tmp_path / "shard"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with {"file": ipc.new_file, "stream": ipc.new_stream}[kind](path, table.schema) as writer:
            writer.write_table(table)
    (shard,) = open_shards([path])
    assert read_texts(shard, 0) == ["good", None, None, "\u00e9"]


def test_a_file_that_is_neither_parquet_nor_arrow_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.parquet"
    path.write_text("<html>not found</html>")
    assert "expected the content of a Parquet file, Arrow file, Arrow stream" in refused(path)


def test_an_empty_file_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "empty.parquet")
    assert "is empty" in refused(tmp_path / "empty.parquet")
    assert "cannot be read" in refused(tmp_path / "missing.parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_without_rows_is_refused(kind, tmp_path: Path, shard_to) -> None:
    path = tmp_path / "shard"
    shard_to(path, [], kind)
    assert "has no rows" in refused(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_shard_is_refused(kind, tmp_path: Path, shard_to) -> None:
    path = tmp_path / "shard"
    shard_to(path, [["some text"] * 50] * 3, kind)
    path.write_bytes(path.read_bytes()[:-120])
    assert "cannot be read" in refused(path)


def test_a_shard_without_a_string_column_text_is_refused_with_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    pq.write_table(pa.table({"content": ["a"], "n": [1]}), path)
    assert "no string column 'text'; its columns: content (string), n (int64)" in refused(path)
    pq.write_table(pa.table({"text": [1]}), path)
    assert "its columns: text (int64)" in refused(path)


def test_a_damaged_page_is_named_by_file_and_row_group(tmp_path: Path, shard_to) -> None:
    path = tmp_path / "shard.parquet"
    shard_to(path, [["first " * 20], ["second " * 20]])
    (shard,) = open_shards([path])
    damaged = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    damaged[column.dictionary_page_offset + column.total_compressed_size - 2] ^= 1
    path.write_bytes(damaged)
    assert read_texts(shard, 0) == ["first " * 20]
    with pytest.raises(DataError, match=rf"row group 1 of shard {path} cannot be read"):
        read_texts(shard, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_changed_since_it_was_opened_is_refused(kind, tmp_path: Path, shard_to) -> None:
    path = tmp_path / "shard"
    shard_to(path, [["a", "b"]], kind)
    (shard,) = open_shards([path])
    shard_to(path, [["a", "b", "c"]], kind)
    with pytest.raises(DataError, match="row group 0 of .*, not .*: the file was changed"):
        read_texts(shard, 0)
    path.unlink()
    with pytest.raises(DataError, match="row group 0 of .* cannot be read"):
        read_texts(shard, 0)


def test_the_fingerprint_follows_names_sizes_and_rows_but_not_places_and_times(tmp_path: Path, shard_to) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    shard_to(here / "1", [["a", "b"], ["c"]])
    shard_to(here / "2", [["a"]])
    shutil.copytree(here, there)
    os.utime(there / "1", (1, 1))
    original = open_shards([here / "1", here / "2"])
    assert fingerprint(open_shards([there / "1", there / "2"])) == fingerprint(original)
    assert fingerprint(original[::-1]) != fingerprint(original)
    assert fingerprint(original[:1]) != fingerprint(original)
    shard_to(there / "1", [["a"], ["b", "c"]])
    assert fingerprint(open_shards([there / "1", there / "2"])) != fingerprint(original)
