"""Shards that are damaged, and caches built of shards."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from argonne.data import TokenCache, build_cache


def spoil(path: Path, row_group: int) -> None:
    """Flip a bit in the text of one row group of a Parquet shard."""
    content = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(row_group).column(1)
    content[chunk.dictionary_page_offset + chunk.total_compressed_size - 2] ^= 1
    path.write_bytes(content)


def build(shards, tokenizer, directory: Path, **others) -> TokenCache:
    """A cache under `directory`, without a word."""
    return build_cache(shards, tokenizer, others.pop("boundary", None), directory, progress=False, **others)


def content(path: Path) -> dict[str, bytes]:
    """Everything a cache is made of."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}
