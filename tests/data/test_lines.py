"""JSON lines are read as they are, whatever is wrong with some of them, plain or compressed, from any row group."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from argonne.data import DataError, SequenceStream, Shard, find_shards, open_shard, open_shards, read_texts
from argonne.data.corpus import line_files, lines
from argonne.data.corpus.documents import read_documents
from argonne.data.corpus.line_files import DecodedFiles
from argonne.data.errors import BROKEN
from argonne.data.tokens.filters import rejection
from tests.data.files import build
from tests.data.files import content as content_of

SUFFIXES = ["jsonl", "jsonl.gz", "jsonl.zst"]

GOOD = b'{"text": "good"}'
LINES: list[tuple[bytes, object]] = [
    (GOOD, "good"),
    (b'{"id": 3, "text": "caf\xc3\xa9 \\u00e9 \\ud83d\\ude00"}\r', "café é 😀"),
    (b'  {"text": "white space around"} \t', "white space around"),
    (b"\xef\xbb\xbf" + GOOD, "good"),
    (b'{"text": "twice", "text": "the last counts"}', "the last counts"),
    (b'{"text": ""}', ""),
    (b'{"text": "a line\\nof two"}', "a line\nof two"),
    (b'{"text": null}', None),
    (b'{"text": 7}', None),
    (b'{"text": ["a"]}', None),
    (b'{"other": "a"}', None),
    (b"{}", None),
    (b'{"text": "half of a pair \\ud83d"}', None),
    (b'{"text": "cut off', BROKEN),
    (b'{"text": "raw \x01 control"}', BROKEN),
    (b'{"text": "no UTF-8 \xff"}', BROKEN),
    (b'{"text": "a"} {"text": "b"}', BROKEN),
    (b'["text"]', BROKEN),
    (b'"text"', BROKEN),
    (b"text", BROKEN),
    (b"[" * 100_000, BROKEN),
    (b"\0", BROKEN),
]
BLANK = [b"", b"\r", b" \t ", b"\r\r"]


def write(path: Path, content: bytes) -> Path:
    """A file, compressed as its name says."""
    if path.name.endswith(".gz"):
        half = len(content) // 2  # in two members
        path.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    elif path.name.endswith(".zst"):
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(content)
    return path


def rows_of(shard: Shard) -> list[object]:
    return [row for group in range(len(shard.rows)) for row in read_texts(shard, group)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of a few lines, read in blocks that are smaller than a line."""
    monkeypatch.setattr(lines, "GROUP_BYTES", 64)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 10)
    monkeypatch.setattr(line_files, "DECODED", DecodedFiles())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_line_is_one_row_in_its_place_whatever_is_wrong_with_it(tmp_path: Path, suffix: str) -> None:
    blanks = itertools.cycle(BLANK)
    content = b"\n".join(line for each, _ in LINES for line in (each, next(blanks)))
    shard = open_shard(write(tmp_path / f"a.{suffix}", b"\n\n" + content))
    assert rows_of(shard) == [row for _, row in LINES]
    assert [rejection(row) for row in (None, BROKEN)] == ["not_text", "broken"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_row_groups_are_the_same_lines_from_any_of_them(tmp_path: Path, small, suffix: str) -> None:
    source = random.Random(suffix)
    for case in range(6):
        texts = ["x" * source.choice([0, 1, 20, 40, 46, 47, 48, 49, 300]) for _ in range(source.randint(1, 40))]
        written = [json.dumps({"text": text}).encode() for text in texts]
        blanks = [source.choice([b"\n", b"\n", b"\r\n", b"\n \n"]) for _ in written]
        content = b"".join(line + end for line, end in zip(written, blanks, strict=True))
        if case % 2:  # no newline at the end
            content = content.rstrip()
        shard = open_shard(write(tmp_path / f"{case}.{suffix}", content))
        expected: list[list[str]] = [[] for _ in shard.rows]
        at = 0
        for text, line in zip(texts, written, strict=True):
            at = content.index(line, at)
            expected[at // 64].append(text)
            at += len(line)
        assert shard.rows == tuple(map(len, expected))
        for group in source.sample(range(len(expected)), len(expected)):
            assert read_texts(shard, group) == expected[group], f"case {case}, row group {group}"


CHECKED = base64.b64decode(
    "KLUv/QRovQEAQoMLEbDrzyIsok0BaWpDQ7I0bxED4OGXJj+VmigBHq4ZXiaQX9a6Jj/5kuiA277oAgEAPJt6AoOHWo4="
)


def test_damage_to_a_compressed_file_is_found_when_it_is_opened(tmp_path: Path) -> None:
    content = b"".join(json.dumps({"text": f"number {number}"}).encode() + b"\n" for number in range(500))
    (tmp_path / "whole.jsonl.zst").write_bytes(CHECKED)
    assert rows_of(open_shard(tmp_path / "whole.jsonl.zst")) == ["checked to the last bit", "and once more"]
    damaged = {
        "cut.jsonl.gz": gzip.compress(content)[:-9],
        "crc.jsonl.gz": flip(gzip.compress(content), -6),
        "middle.jsonl.gz": flip(gzip.compress(content), 200),
        "head.jsonl.gz": flip(gzip.compress(content), 0),
        "cut.jsonl.zst": CHECKED[:-5],
        **{
            f"{place}.jsonl.zst": flip(CHECKED, place) for place in range(len(CHECKED)) if place != 5
        },  # 5: the window's size
        "empty.jsonl": b"",
        "blank.jsonl": b"\n \r\n",
        "empty.jsonl.gz": gzip.compress(b""),
    }
    for name, found in damaged.items():
        (tmp_path / name).write_bytes(found)
        with pytest.raises(DataError, match="cannot be read: |is empty|has no rows") as refusal:
            open_shard(tmp_path / name)
        assert "\n" not in str(refusal.value)
    shards = open_shards(find_shards([str(tmp_path / "*.zst")]), "skip")
    assert sum(not shard.unreadable for shard in shards) == 1


def flip(content: bytes, place: int) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 4
    return bytes(damaged)


@pytest.mark.parametrize(
    ("content", "column", "expected"),
    [
        (b'{"body": "a", "n": 1}\n{"n": 2}', "text", "a JSON object with a string 'text'; the first has: body, n"),
        (b'{"text": 1}', "text", "a JSON object with a string 'text'; the first has: text"),
        (b"no JSON\nat all", "text", "a JSON object with a string 'text'; the first is no JSON object"),
        (b'{"n": 1}', ("messages", "prompt"), "a JSON object with any of 'messages', 'prompt'; the first has: n"),
    ],
)
def test_a_file_without_the_column_is_refused_with_what_it_has(tmp_path: Path, content, column, expected: str) -> None:
    with pytest.raises(DataError) as refusal:
        open_shard(write(tmp_path / "a.jsonl", content), column)
    assert str(refusal.value) == f"shard {tmp_path / 'a.jsonl'} has no line that is {expected}"


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD + b"\n" + GOOD)
    shard = open_shard(path)
    path.write_bytes(GOOD + b" " + GOOD)
    with pytest.raises(DataError, match="has 1 rows, not 2: the file was changed"):
        read_texts(shard, 0)
    path.write_bytes(GOOD)
    with pytest.raises(DataError, match="the file was changed"):
        read_texts(shard, 0)


CHATS = [
    {"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "two é"}], "id": 1},
    {"messages": [], "id": 2},
    {"messages": None, "id": 3},
    {"messages": [{"role": "user", "content": "three?"}], "id": 4},
]


@pytest.mark.parametrize("suffix", [*SUFFIXES, "parquet"])
def test_several_columns_of_any_type_are_dicts_and_what_cannot_be_read_is_marked(tmp_path: Path, suffix: str) -> None:
    path, columns = tmp_path / f"a.{suffix}", ("messages", "prompt", "id")
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(CHATS), path, row_group_size=3)
    else:
        write(path, b"\n".join(json.dumps(row | {"more": 1}).encode() for row in CHATS))
    (shard,) = open_shards([path], column=columns)
    assert rows_of(shard) == CHATS


def test_a_nested_text_that_is_no_unicode_makes_its_row_unusable(tmp_path: Path) -> None:
    one = {"messages": [{"role": "user", "content": b"fine"}], "prompt": "a"}
    two = {"messages": [{"role": "user", "content": b"\xff"}], "prompt": "b"}
    raw = pa.Table.from_pylist([one, two, one])
    nested = raw["messages"].combine_chunks()
    nested = nested.view(pa.list_(pa.struct([(each.name, pa.string()) for each in nested.type.value_type])))
    pq.write_table(raw.set_column(0, "messages", nested), tmp_path / "a.parquet")
    half = b'{"messages": [{"role": "user", "content": "\\ud83d"}], "prompt": "b"}'
    fine = b'{"messages": [{"role": "user", "content": "fine"}], "prompt": "a"}'
    write(tmp_path / "a.jsonl", b"\n".join([fine, half, fine]))
    expected = {"messages": [{"role": "user", "content": "fine"}], "prompt": "a"}
    for path in (tmp_path / "a.parquet", tmp_path / "a.jsonl"):
        shard = open_shard(path, ("messages", "prompt"))
        assert read_texts(shard, 0) == [expected, BROKEN, expected]


def test_a_compressed_file_is_decoded_about_once_by_lanes_that_are_apart(
    tmp_path: Path, small, tokenizer, corpus_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where lanes are many row groups apart; and what they deliver is that of the plain file, and of Parquet."""
    monkeypatch.setattr(lines, "GROUP_BYTES", 2000)
    ((texts,),) = corpus_of([[400]], seed=5, rejected=0.1)
    columns = tmp_path / "a.parquet"
    content = b"\n".join(json.dumps({"text": text}).encode() for text in texts)
    plain = open_shards([write(tmp_path / "a.jsonl", content)])
    packed = open_shards([write(tmp_path / "a.jsonl.gz", content)])
    count = len(plain[0].rows)
    assert count > 30
    with pq.ParquetWriter(columns, pa.schema([("text", pa.string())])) as file:
        for rows in plain[0].rows:
            file.write_table(pa.table({"text": texts[:rows]}))
            texts = texts[rows:]
    decoded, made = 0, line_files.groups

    def counted(*args):
        nonlocal decoded
        for data in made(*args):
            decoded += 1
            yield data

    monkeypatch.setattr(line_files, "groups", counted)
    kinds = (open_shards([columns]), plain, packed)
    streams = [SequenceStream(shards, tokenizer, 30, 8, None, range(8)) for shards in kinds]
    for number in range(150):
        lane = number % 8 if number % 3 else 2  # one is ahead
        one, *others = [stream.next_sequence(lane).tokens.tolist() for stream in streams]
        assert others == [one, one]
    assert decoded <= count + 1, "once, however often and in whatever order lanes come by"
    assert list(read_documents([str(tmp_path / "a.jsonl.gz")])) == list(read_documents([str(tmp_path / "a.jsonl")]))
    assert decoded <= count + 2, "opening each file again looks at its first row group"


def test_tokens_made_beforehand_are_those_of_the_same_rows_in_parquet(tmp_path: Path, small, tokenizer) -> None:
    texts = [f"a text of some length, which is number {number} of all of them" for number in range(40)]
    content = b"broken\n".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    pq.write_table(pa.table({"text": [each for text in texts for each in (text, None)][:-1]}), tmp_path / "a.parquet")
    made = [write(tmp_path / f"a.{suffix}", content) for suffix in SUFFIXES]
    caches = [build(open_shards([path]), tokenizer, tmp_path / path.suffix) for path in (tmp_path / "a.parquet", *made)]
    tokens = [
        b"".join(files[name] for name in sorted(files) if name.endswith(".bin"))
        for files in (content_of(c.path) for c in caches)
    ]
    assert len(set(tokens)) == 1
    assert [dict(cache.dropped) for cache in caches] == [{"not_text": 39}] + [{"broken": 39}] * 3


def test_a_file_that_grows_keeps_its_row_groups_but_the_last(tmp_path: Path, small) -> None:
    content = b"".join(json.dumps({"text": "x" * (number % 50)}).encode() + b"\n" for number in range(60))
    before = open_shard(write(tmp_path / "a.jsonl", content)).rows
    after = open_shard(write(tmp_path / "a.jsonl", content + content)).rows
    assert after[: len(before) - 1] == before[:-1]
    assert sum(after) == 2 * sum(before)


def test_directories_stand_for_json_lines_where_nothing_else_is_in_them(tmp_path: Path) -> None:
    names = [write(tmp_path / f"part-{number}.{suffix}", GOOD).name for number, suffix in enumerate(SUFFIXES)]
    assert [path.name for path in find_shards([str(tmp_path)])] == names
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    assert [path.name for path in find_shards([str(tmp_path)])] == ["b.parquet"]
