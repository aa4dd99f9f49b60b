"""What is wrong with the data is said with the flag and the globs that named it, and the shard, in one line."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from argonne.data import DataError, parse_globs, train_tokenizer
from argonne.parallel import ArgonneError, ProcessGroups
from argonne.training.config import DataFlags
from argonne.training.evaluation import held_out_sequences
from argonne.training.run.corpora import Corpora

GOOD = ["some words that make a document of more than ten tokens, all of them plain letters"] * 30


def shard(path: Path, texts: pa.Array | list[str] = GOOD, **more: list[object]) -> str:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": texts, **more}), path)
    return str(path)


def two_texts(path: Path) -> str:
    pq.write_table(pa.Table.from_arrays([pa.array(GOOD), pa.array(GOOD)], ["text", "text"]), path)
    return str(path)


BAD = {
    "two columns": (two_texts, "has 2 columns 'text'; legal: one. Its columns: text (string), text (string)"),
    "numbers": (lambda path: shard(path, pa.array([1, 2])), "'text' is int64; its columns: text (int64)"),
    "lists": (lambda path: shard(path, pa.array([["a"]])), "has no string column 'text'; 'text' is list<"),
    "no rows": (lambda path: shard(path, pa.array([], pa.string())), "has no rows"),
    "nothing": (lambda path: str(path), "no data shards match"),
    "a directory": (lambda path: [path.mkdir(), str(path)][1], "those ending in .parquet or .arrow are taken"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("flag", ["data_glob", "validation_glob"])
def test_what_cannot_be_opened_is_named_with_its_flag(tmp_path: Path, flag: str, name: str) -> None:
    make, expected = BAD[name]
    good, bad = shard(tmp_path / "good.parquet"), make(tmp_path / "bad.parquet")
    globs = {"data_glob": (good,), flag: (bad,)}
    with pytest.raises(DataError) as refusal:
        Corpora.open(DataFlags(**globs), seed=0)
    assert str(refusal.value).startswith(f"{flag}={bad!r}: ")
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_of_a_mixture_the_corpus_is_named(tmp_path: Path) -> None:
    good, bad = shard(tmp_path / "good.parquet"), shard(tmp_path / "short.parquet", ["short"] * 5)
    tokenizer = train_tokenizer(GOOD)
    corpora = Corpora.open(DataFlags(data_glob=(f"{good}:1", f"{bad}:2"), block_size=16), seed=0)
    with pytest.raises(DataError) as refusal:
        corpora.check_block_size(tokenizer, None)
    assert str(refusal.value).startswith(f"data_glob={bad!r}: no usable documents in the data; rows dropped: short 5")
    with pytest.raises(DataError, match=r"data_glob='.*nowhere': no data shards match"):
        Corpora.open(DataFlags(data_glob=(f"{good}:1", f"{tmp_path}/nowhere:2")), seed=0)


@pytest.mark.parametrize(
    ("texts", "block_size", "expected"),
    [
        (["short"] * 3, 16, "no usable documents in the data; rows dropped: short 3"),
        ([""] * 3, 16, "rows dropped: empty 3"),
        (["1234567890 " * 20] * 2, 16, "rows dropped: digits 2"),
        (GOOD[:1], 4096, "the held-out text has fewer than block_size+1=4097 tokens; legal: more text"),
    ],
)
def test_held_out_text_that_cannot_be_used_is_named(
    tmp_path: Path, texts: list[str], block_size: int, expected: str
) -> None:
    good, bad = shard(tmp_path / "good.parquet"), shard(tmp_path / "bad.parquet", texts)
    corpora = Corpora.open(DataFlags(data_glob=(good,), validation_glob=(bad,)), seed=0)
    groups, tokenizer = ProcessGroups.single(), train_tokenizer(GOOD)
    with pytest.raises(ArgonneError) as refusal:
        held_out_sequences(corpora.validation, tokenizer, block_size, None, 4, groups, corpora.flags.validation_glob)
    assert str(refusal.value).startswith(f"validation_glob={bad!r}: ")
    assert expected in str(refusal.value)


def test_columns_whose_names_break_lines_or_are_thousands_stay_one_readable_line(tmp_path: Path) -> None:
    columns = {"a\nb": [1], "c" * 500: [2], **{f"column {number}": [number] for number in range(3000)}}
    pq.write_table(pa.table(columns), tmp_path / "wide.parquet")
    with pytest.raises(DataError) as refusal:
        Corpora.open(DataFlags(data_glob=(str(tmp_path),)), seed=0)
    assert "its columns: a b (int64), ccc" in str(refusal.value)
    assert str(refusal.value).endswith("column 17 (int64), and 2982 more")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("words", [["a:1e308", "b:1e308"], ["a:1e-300", "b:1"], ["a:1e400", "b:1"], ["a:0.0", "b:1"]])
def test_a_weight_that_is_no_share_is_refused_with_its_glob(words: list[str]) -> None:
    with pytest.raises(DataError, match=r"data_glob='a:.*' has a weight of .*legal"):
        parse_globs(words)
