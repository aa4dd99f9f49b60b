"""Several ways from text in Parquet or JSON lines to batches of token ids, for ``benchmarks/data_pipeline.py``.

Each is told to `prepare` for the same documents, and then takes turns: one pass over them each time. Rows that the
pipeline drops are dropped by all, by the same functions.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from argonne.data import (
    Assignment,
    Batch,
    BatchStream,
    Encoder,
    Prefetcher,
    SequenceStream,
    Shard,
    default_lanes,
    load_tokenizer,
    open_shards,
    read_texts,
    rejection,
)
from argonne.data.lanes.plan import cut_units
from argonne.data.lanes.reader import batch_rows, cut_batches
from argonne.data.tokens.encoder import shared_encoder
from argonne.data.tokens.filters import FILTERS

MAP_ROWS = 1000
"""Rows that `datasets` maps at a time: its default, and that of the recipe."""
LOOP_ROWS = 64
"""Rows of one call of the tokenizer in the original's loop."""


@dataclass(frozen=True)
class Job:
    """What every contestant is to deliver."""

    shards: tuple[Path, ...]
    tokenizer: Path
    """Directory of the tokenizer."""
    block_size: int
    sequences: int
    """Sequences in a batch."""

    @property
    def length(self) -> int:
        """Tokens in a sequence, with the one that is only a target."""
        return self.block_size + 1


@dataclass(frozen=True)
class Ready:
    """A contestant that is ready to take turns."""

    turn: Callable[[], int]
    """Takes one pass over the documents, and says how many tokens it delivered."""
    reason: str | None = None
    """Why the fast path that was asked for is not taken."""
    close: Callable[[], None] = lambda: None
    """Ends its threads."""


@dataclass(frozen=True)
class Contestant:
    """One way."""

    name: str
    prepare: Callable[[Job], Ready]
    """Opens files, starts threads, and warms up."""


def pipeline(fast: bool, lines: str = "") -> Callable[[Job], Ready]:
    """Argonne, as a training run uses it: sequences of every lane, in batches that a thread prepares.

    ``lines`` is the suffix of JSON lines that are read in place of Parquet.
    """

    def prepare(job: Job) -> Ready:
        shards = open_shards(as_lines(job, lines) if lines else job.shards)
        rows = sum(sum(shard.rows) for shard in shards)
        lanes = default_lanes(rows)
        tokenizer = load_tokenizer(job.tokenizer)
        sequences = SequenceStream(shards, tokenizer, job.block_size, lanes, None, range(lanes), fast=fast)
        batches = BatchStream(sequences, Assignment(micro_batch=job.sequences, accumulation=1))
        prefetcher = Prefetcher(batches.next_batch)
        seen = _rows_seen(prefetcher.get())

        def turn() -> int:
            nonlocal seen
            until = seen + rows  # lanes go on to the next pass on their own, without a gap
            tokens = 0
            while seen < until:
                batch = prefetcher.get()
                tokens += batch.tokens.size
                seen = _rows_seen(batch)
            return tokens

        return Ready(turn, shared_encoder(tokenizer).reason if fast else None, prefetcher.close)

    return prepare


def as_lines(job: Job, suffix: str) -> list[Path]:
    """The shards as JSON lines, written beside the tokenizer."""
    folder = job.tokenizer / suffix
    folder.mkdir()
    written = []
    for path in job.shards:
        written.append(folder / f"{path.stem}.{suffix}")
        compression = {"jsonl": None, "jsonl.gz": "gzip", "jsonl.zst": "zstd"}[suffix]
        with pa.output_stream(written[-1], compression=compression) as file:
            for texts in _row_lists([path]):
                rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
                file.write("".join(rows).encode())
    return written


def tokenizer_alone(fast: bool) -> Callable[[Job], Ready]:
    """Argonne's encoder, on lists that are in memory: those that the pipeline gives it."""

    def prepare(job: Job) -> Ready:
        encode = Encoder(load_tokenizer(job.tokenizer), fast=fast)
        lists = [
            [text for text in rows if isinstance(text, str) and rejection(text) is None]
            for texts in _units(open_shards(job.shards))
            for rows in cut_batches(texts, batch_rows())
        ]
        encode(lists[0])
        return Ready(
            lambda: sum(len(ids) for texts in lists for ids in encode(texts) if ids is not None),
            encode.reason if fast else None,
        )

    return prepare


def datasets_map(job: Job) -> Ready:
    """Hugging Face `datasets`: streamed, tokenised by `map`, grouped by `map` as its examples do."""
    from datasets import load_dataset

    tokenizer = load_tokenizer(job.tokenizer)

    def tokenise(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        kept = [text for text in rows["text"] if rejection(text) is None]
        ids = tokenizer(kept, add_special_tokens=False, return_attention_mask=False)["input_ids"] if kept else []
        return {"input_ids": [each for each in ids if len(each) >= FILTERS.min_tokens]}

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = list(itertools.chain.from_iterable(rows["input_ids"]))
        whole = len(joined) - len(joined) % job.length
        return {"input_ids": [joined[start : start + job.length] for start in range(0, whole, job.length)]}

    def batches() -> Iterator[Any]:
        files = [str(path) for path in job.shards]
        stream = load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=cache.name)
        stream = stream.map(tokenise, batched=True, batch_size=MAP_ROWS, remove_columns=["text"])
        stream = stream.map(group, batched=True, batch_size=MAP_ROWS).with_format("numpy")
        return (np.stack(rows["input_ids"]) for rows in stream.iter(batch_size=job.sequences))

    cache = tempfile.TemporaryDirectory()
    next(batches())
    return Ready(lambda: sum(batch.size for batch in batches()))


def plain_loop(job: Job) -> Ready:
    """What the original did: lists of rows through the tokenizer, joined in a list that is cut."""
    tokenizer = load_tokenizer(job.tokenizer)

    def batches() -> Iterator[Any]:
        joined: list[int] = []
        sequences: list[list[int]] = []
        for texts in _row_lists(job.shards):
            kept = [text for text in texts if rejection(text) is None]
            for ids in tokenizer(kept, add_special_tokens=False)["input_ids"] if kept else []:
                if len(ids) >= FILTERS.min_tokens:
                    joined.extend(ids)
            while len(joined) >= job.length:
                sequences.append(joined[: job.length])
                joined = joined[job.length :]
                if len(sequences) == job.sequences:
                    yield np.array(sequences)
                    sequences = []

    next(batches())
    return Ready(lambda: sum(batch.size for batch in batches()))


FAST, SLOW = "argonne, fast path", "argonne"
FAST_ALONE, SLOW_ALONE = "tokenizer alone, fast path", "tokenizer alone"
LINES, GZIP, ZSTD = (f"{FAST}, {suffix}" for suffix in ("jsonl", "jsonl.gz", "jsonl.zst"))
DATASETS, LOOP = "datasets, streaming map", "tokenizer(list) loop"
CONTESTANTS = (
    Contestant(FAST, pipeline(fast=True)),
    Contestant(SLOW, pipeline(fast=False)),
    Contestant(LINES, pipeline(fast=True, lines="jsonl")),
    Contestant(GZIP, pipeline(fast=True, lines="jsonl.gz")),
    Contestant(ZSTD, pipeline(fast=True, lines="jsonl.zst")),
    Contestant(FAST_ALONE, tokenizer_alone(fast=True)),
    Contestant(SLOW_ALONE, tokenizer_alone(fast=False)),
    Contestant(DATASETS, datasets_map),
    Contestant(LOOP, plain_loop),
)


def _rows_seen(batch: Batch) -> int:
    return sum(state.documents + sum(state.dropped.values()) for state in batch.states.values())


def _units(shards: Sequence[Shard]) -> Iterator[list[object]]:
    """The rows of each unit, in order."""
    units = cut_units(shards, default_lanes(sum(sum(shard.rows) for shard in shards)))
    for (shard, row_group), parts in itertools.groupby(units, key=lambda unit: (unit.shard, unit.row_group)):
        texts = read_texts(shards[shard], row_group)
        yield from (texts[unit.first : unit.end] for unit in parts)


def _row_lists(shards: Iterable[Path]) -> Iterator[list[Any]]:
    for path in shards:
        with pq.ParquetFile(path) as parquet:
            for rows in parquet.iter_batches(LOOP_ROWS, columns=["text"]):
                yield rows.column(0).to_pylist()
