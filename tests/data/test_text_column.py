"""A corpus whose texts lie in another column than `text` is read from there, in every format and every way."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from argonne.data import DataError, SequenceStream, describe, find_shards, open_shards, read_texts, restore
from argonne.data.corpus import row_groups
from tests.data.files import build

KINDS = ("parquet", "file", "stream")


def write(path: Path, columns: dict[str, list[object]], kind: str = "parquet") -> Path:
    """A shard of two row groups or record batches."""
    table = pa.table(columns)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with {"file": ipc.new_file, "stream": ipc.new_stream}[kind](path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


@pytest.fixture
def corpus(corpus_of, tmp_path: Path) -> tuple[list[Path], list[list[str]]]:
    """A shard of each kind, with a column `text` that is no text of the corpus, and one that is."""
    ((texts, others),) = corpus_of([[12, 12]], seed=11, rejected=0.0)
    paths, kept = [], []
    for number, kind in enumerate(KINDS):
        own = texts[4 * number : 4 * number + 4]
        columns = {"text": others[:4], "n": [1, 2, 3, 4], "raw content": own}
        paths.append(write(tmp_path / f"{number}.{kind}", columns, kind))
        kept.append(own)
    return paths, kept


def test_every_format_is_read_from_the_column_that_is_named(corpus) -> None:
    paths, texts = corpus
    for shard, own in zip(open_shards(paths, column="raw content"), texts, strict=True):
        assert [*read_texts(shard, 0), *read_texts(shard, 1)] == own
    assert read_texts(open_shards(paths)[0], 0) != texts[0][:2]


@pytest.mark.parametrize("streamed", [False, True])
def test_lanes_and_caches_read_the_column_that_is_named(
    corpus, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """As they read the same texts from a column `text`; also piece by piece, as large row groups are read."""
    if streamed:
        monkeypatch.setattr(row_groups, "STREAMED_BYTES", 0)
    paths, texts = corpus
    plain = [write(tmp_path / f"plain-{n}", {"text": own}, KINDS[n]) for n, own in enumerate(texts)]
    named, same = open_shards(paths, column="raw content"), open_shards(plain)
    here, there = (SequenceStream(shards, tokenizer, 20, 2, None, [0, 1]) for shards in (named, same))
    for number in range(8):
        assert here.next_sequence(number % 2).tokens.tolist() == there.next_sequence(number % 2).tokens.tolist()
    found = [build(shards, tokenizer, tmp_path / "caches") for shards in (named, same, open_shards(paths))]
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint
    assert len({cache.path for cache in found}) == 3, "another column of the same files is another cache"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("body", "has no string column 'body'; its columns: text (string), n (int64), raw content (string)"),
        ("n", "has no string column 'n'; 'n' is int64; its columns: text (string), n (int64)"),
        ("Text", "has no string column 'Text'; its columns: text (string)"),
        ("a\nb", r"has no string column 'a\nb'; its columns: text (string)"),
    ],
)
def test_a_named_column_that_is_none_of_texts_is_refused_with_the_columns(
    tmp_path: Path, kind: str, column: str, expected: str
) -> None:
    path = write(tmp_path / "shard", {"text": ["a", "b"], "n": [1, 2], "raw content": ["c", "d"]}, kind)
    with pytest.raises(DataError) as refusal:
        open_shards([path], column=column)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_shard_that_lacks_the_named_column_is_quarantined_and_restored_with_it(corpus, tmp_path: Path) -> None:
    paths, _ = corpus
    write(tmp_path / "1.file", {"text": ["no content here"]}, "file")
    shards = open_shards(paths, "skip", "raw content")
    assert [bool(shard.unreadable) for shard in shards] == [False, True, False]
    assert "has no string column 'raw content'" in shards[1].unreadable
    again = restore(describe(shards), find_shards([str(tmp_path)]) and paths, "skip", "raw content")
    assert again == shards
    assert read_texts(again[2], 0) == read_texts(shards[2], 0)
