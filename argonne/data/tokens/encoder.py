"""Turning documents into token ids: in threads, in bounded memory, as fast as the tokenizer allows."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from argonne.data.tokens.byte_pair import BytePair, Declined, byte_pair, unless_refused
from argonne.data.tokens.filters import TokenIds
from argonne.data.tokens.tokenizer import plain_backend
from argonne.data.tokens.windows import Windows
from argonne.parallel.communication.environment import this_process

BATCH_ROWS_VARIABLE, DEFAULT_BATCH_ROWS, MIN_BATCH_ROWS = "RESUME_TOKENIZER_BATCH_ROWS", 64, 16
WORKERS_VARIABLE, MAX_DEFAULT_WORKERS, MIN_WORKERS = "RESUME_TOKENIZER_WORKERS", 8, 1
# Texts are dealt out in more shares than there are threads, as some texts are longer than others.
SHARES_PER_WORKER = 4


class Encoder:
    """Turns batches of documents into ids, with a private copy of the tokenizer's backend.

    The copy reads special tokens that are written out in a document as ordinary text, while the tokenizer
    itself stays as it is and may be used by another thread meanwhile.

    Args:
        fast: use the fast path where there is one; the ids are the same.
        workers: threads that share a batch; 1 for an encoder that is called from several threads.

    Attributes:
        fast: whether the fast path is used.
        reason: why it is not, in one line; None if it is.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        fast: bool = True,
        workers: int | None = None,
    ) -> None:
        threads = tokeniser_threads()
        self._workers = threads if workers is None else workers
        self._backend = plain_backend(tokenizer)
        self._backend.encode_special_tokens = True
        self._byte_pair: BytePair | None = None
        self.reason: str | None = None if fast else "it was not asked for"
        if fast:
            try:
                self._byte_pair = byte_pair(self._backend)
            except Declined as reason:
                self.reason = str(reason)
        self.fast = self._byte_pair is not None
        self._windows = Windows(self._backend, self._whole)

    def __call__(self, texts: list[str]) -> list[TokenIds | None]:
        """Ids of each text, no special tokens added; None for a text that cannot be tokenised even alone."""
        if all(len(text) <= self._windows.window for text in texts):
            return self._whole(texts)
        short = iter(self._whole([text for text in texts if len(text) <= self._windows.window]))
        return [next(short) if len(text) <= self._windows.window else self._windows(text) for text in texts]

    def _whole(self, texts: list[str]) -> list[TokenIds | None]:
        if self._byte_pair is None:
            return self._ordinary(texts)
        outcomes = self._in_threads(self._byte_pair, texts)
        left = [index for index, ids in enumerate(outcomes) if ids is None]
        if left:
            for index, ids in zip(left, self._ordinary([texts[index] for index in left]), strict=True):
                outcomes[index] = ids
        return outcomes

    def _in_threads(self, encode: BytePair, texts: list[str]) -> list[TokenIds | None]:
        shares = min(len(texts), SHARES_PER_WORKER * self._workers)
        if shares < 2 or self._workers == 1:
            return [encode(text) for text in texts]
        outcomes: list[TokenIds | None] = [None] * len(texts)

        def work(share: int) -> None:
            outcomes[share::shares] = [encode(text) for text in texts[share::shares]]

        for _ in tokeniser_pool().map(work, range(shares)):
            pass
        return outcomes

    def _ordinary(self, texts: list[str]) -> list[TokenIds | None]:
        found: Sequence[Encoding | None] | None
        found = unless_refused(lambda: self._backend.encode_batch_fast(texts, add_special_tokens=False))
        if found is None:  # one bad text fails its whole batch
            alone = functools.partial(self._backend.encode, add_special_tokens=False)
            found = [unless_refused(functools.partial(alone, text)) for text in texts]
        return [None if each is None else np.array(each.ids, dtype=np.int32) for each in found]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[TokenIds | None]:
    """One batch through an `Encoder`; keep one of these for many."""
    return Encoder(tokenizer)(texts)


@functools.lru_cache(maxsize=2)
def shared_encoder(tokenizer: PreTrainedTokenizerFast, fast: bool = True) -> Encoder:
    """One encoder for all readers of a process: its proofs take seconds. For a tokenizer that stays as it is.

    Readers call it from the threads of `tokeniser_pool`, where an encoder that waited for these would wait for ever.
    """
    return Encoder(tokenizer, fast=fast, workers=1)


def tokeniser_threads() -> int:
    """Threads that tokenise, from the environment, or as many as this rank has processors."""
    workers = _from_environment(WORKERS_VARIABLE, MIN_WORKERS)
    if workers is None:
        return min(_processors(), MAX_DEFAULT_WORKERS)
    os.environ.setdefault("RAYON_NUM_THREADS", str(workers))  # read by the backend at its first batch
    return workers


def tokeniser_pool() -> ThreadPoolExecutor:
    """Those threads, the same for all."""
    return _threads(tokeniser_threads(), os.getpid())


def batch_rows() -> int:
    """Documents tokenised at a time, from the environment."""
    return _from_environment(BATCH_ROWS_VARIABLE, MIN_BATCH_ROWS) or DEFAULT_BATCH_ROWS


@functools.lru_cache(maxsize=1)
def _threads(workers: int, process: int) -> ThreadPoolExecutor:
    """Of all encoders and readers, as tiktoken warms up for each thread; `process`: a fork has none of them."""
    return ThreadPoolExecutor(workers, thread_name_prefix="tokenise")


def _processors() -> int:
    """Of this machine, this rank's share."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, here // this_process().local_world_size)


def _from_environment(variable: str, least: int) -> int | None:
    value = os.environ.get(variable)
    return None if value is None else _whole_number(variable, value, least)


@functools.cache  # so that a bad value is reported once
def _whole_number(variable: str, value: str, least: int) -> int | None:
    if value.isdecimal() and int(value) >= least:
        return int(value)
    warnings.warn(f"{variable}={value} is ignored; it must be a whole number, at least {least}", stacklevel=2)
    return None
