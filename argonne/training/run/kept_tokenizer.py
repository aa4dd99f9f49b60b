"""The tokenizer of a run that is given none: trained on its data before the first step, and kept with it ever after.

Weights depend on it. So a run that has a checkpoint goes on with the copy in there, whatever became of its data and
of the directory's own copy.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from argonne.data import (
    DataError,
    OnBad,
    Shard,
    load_tokenizer,
    read_texts,
    tokenizer_fingerprint,
    train_tokenizer,
    write_tokenizer,
)
from argonne.data.errors import one_line
from argonne.data.tokens.tokenizer import SPECIAL_TOKENS
from argonne.files import TEMPORARY, set_aside, sync

TOKENIZER_TRAINING_BYTES = 16 << 20
"""The fallback tokenizer is trained on this much text at most, from the beginning of the data."""


def is_kept(path: Path, fingerprint: str | None) -> bool:
    """Whether the tokenizer of that fingerprint lies at ``path``, whole."""
    try:
        return fingerprint is not None and tokenizer_fingerprint(load_tokenizer(path)) == fingerprint
    except DataError:
        return False


def fallback_tokenizer(path: Path, fingerprint: str | None, shards: Sequence[Shard], on_bad: OnBad = "raise") -> str:
    """The one kept at ``path`` if it is that of the run; else a byte-level BPE of the data's own text, as JSON.

    Nothing is written: what is made of it may still be refused.
    """
    if is_kept(path, fingerprint):
        tokenizer = load_tokenizer(path)
    else:
        print("no --tokenizer-path: training a byte-level BPE of 12,000 on the data", flush=True)
        tokenizer = train_tokenizer(_some_text(shards, on_bad))
    return tokenizer.backend_tokenizer.to_str()


def from_json(text: str) -> PreTrainedTokenizerFast:
    """The tokenizer that ``fallback_tokenizer`` tells of, as it is once saved and loaded."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **SPECIAL_TOKENS)


def keep(tokenizer: PreTrainedTokenizerFast, path: Path) -> bool:
    """See that ``tokenizer`` lies at ``path``; returns whether it had to be written."""
    if is_kept(path, tokenizer_fingerprint(tokenizer)):
        return False
    temporary = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_tokenizer(tokenizer, temporary)
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif os.path.lexists(path):
            set_aside(path)
        os.replace(temporary, path)
        sync(path.parent)
    except Exception as error:  # several libraries write, and each tells of a full disk in its own way
        shutil.rmtree(temporary, ignore_errors=True)
        raise DataError(f"the tokenizer cannot be kept at {str(path)!r}: {one_line(error)}") from error
    return True


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
