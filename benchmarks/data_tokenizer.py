"""The tokenizer that the benchmarks of the data pipeline use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from argonne.data import load_tokenizer, open_shard, read_texts, train_tokenizer
from argonne.parallel import ArgonneError


def choose_tokenizer(name: str, shards: Sequence[Path]) -> PreTrainedTokenizerFast:
    """Qwen2.5's for "qwen", one trained on the first of ``shards`` for "trained", or the one in a folder.

    Raises:
        ArgonneError: it cannot be had.
    """
    if name == "qwen":
        try:
            from tests.qwen import qwen
        except ImportError as error:
            raise ArgonneError(f"tokenizer=qwen cannot be built: {error}; pip install -e '.[bench]'") from None
        return qwen()
    if name == "trained":
        shard = open_shard(shards[0])
        texts = (text for group in range(len(shard.rows)) for text in read_texts(shard, group))
        return train_tokenizer(text for text in texts if isinstance(text, str))
    return load_tokenizer(name)
