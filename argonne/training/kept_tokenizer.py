"""The tokenizer of a run that is given none: trained on its data, and kept with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from argonne.data import DataError, OnBad, Shard, fingerprint, read_texts, train_tokenizer, write_tokenizer

TOKENIZER_TRAINING_BYTES = 16 << 20
"""The fallback tokenizer is trained on this much text at most, from the beginning of the data."""


def train_kept_tokenizer(shards: Sequence[Shard], path: Path, on_bad: OnBad = "raise") -> None:
    """The fallback: a byte-level BPE of the data's own text, kept at ``path`` with what it was trained on."""
    origin = {"data": fingerprint(shards)}
    record = path / "trained_on.json"
    if record.exists() and json.loads(record.read_text()) == origin:
        return
    print("no --tokenizer-path: training a byte-level BPE of 12,000 on the data", flush=True)
    tokenizer = train_tokenizer(_some_text(shards, on_bad))
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write_tokenizer(tokenizer, temporary)
    (temporary / record.name).write_text(json.dumps(origin))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def _some_text(shards: Sequence[Shard], on_bad: OnBad) -> Iterator[str]:
    left = TOKENIZER_TRAINING_BYTES
    for shard in shards:
        for row_group in range(len(shard.rows)):
            try:
                texts = read_texts(shard, row_group)
            except DataError:
                if on_bad == "raise":
                    raise
                continue  # the lanes report it
            for text in texts:
                if isinstance(text, str):
                    yield text
                    left -= len(text.encode(errors="replace"))
                if left <= 0:
                    return
