"""A small generated corpus and a small tokenizer, shared by the tests of the data pipeline."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from argonne.data import Shard, open_shards, train_tokenizer
from argonne.data.cache import store as cache

Row = object
Corpus = list[list[list[Row]]]
"""Rows of each row group of each shard."""

SYLLABLES = ["ba", "con", "dri", "el", "fan", "go", "hu", "ist", "ka", "lo", "men", "nor", "ti", "ra", "sel"]
WORDS = ["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)]
REJECTED: list[Row] = [None, "", "1234567890 " * 8, "#$%& " * 20, "too short"]


def english(source: random.Random, words: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(words)).capitalize() + "."


def make_corpus(rows: Sequence[Sequence[int]], seed: int, rejected: float = 0.3) -> Corpus:
    """`rows[shard][row_group]` random rows; the first row of all is always usable."""
    source = random.Random(seed)

    def row() -> Row:
        if source.random() < rejected:
            return source.choice(REJECTED)
        return english(source, source.randint(12, 40))

    corpus = [[[row() for _ in range(count)] for count in shard] for shard in rows]
    first = next(group for shard in corpus for group in shard if group)
    first[0] = english(source, 20)
    return corpus


def write_shard(path: Path, groups: Sequence[Sequence[Row]], kind: str = "parquet") -> None:
    """One shard of the given kind, a row group or record batch for each of `groups`."""
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    batches = [
        pa.record_batch([pa.array(range(len(texts)), pa.int64()), pa.array(texts, pa.string())], schema=schema)
        for texts in groups
    ]
    if kind == "parquet":
        with pq.ParquetWriter(path, schema, write_page_checksum=True) as parquet:
            for batch in batches:
                parquet.write_batch(batch, row_group_size=max(1, batch.num_rows))
        return
    with {"file": ipc.new_file, "stream": ipc.new_stream}[kind](path, schema) as arrow:
        for batch in batches:
            arrow.write_batch(batch)


@pytest.fixture(scope="session")
def corpus_of() -> Callable[..., Corpus]:
    return make_corpus


@pytest.fixture(scope="session")
def shard_to() -> Callable[..., None]:
    return write_shard


@pytest.fixture(scope="session")
def shards_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Shard, ...]]:
    """Writes a corpus to files of its own and opens them; the kinds of shard take turns."""

    def write(corpus: Corpus, kinds: Sequence[str] = ("parquet", "file", "stream")) -> tuple[Shard, ...]:
        folder = tmp_path_factory.mktemp("corpus")
        paths = [folder / f"shard-{index}.bin" for index in range(len(corpus))]
        for path, groups, kind in zip(paths, corpus, itertools.cycle(kinds)):
            write_shard(path, groups, kind)
        return open_shards(paths)

    return write


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    source = random.Random(0)
    return train_tokenizer((english(source, 40) for _ in range(200)), vocab_size=400)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token caches of several units, more than are open at a time, of the smallest corpus."""
    monkeypatch.setattr(cache, "MIN_UNIT_ROWS", 6)
    monkeypatch.setattr(cache, "OPEN_UNITS", 2)
