"""Building a token cache: what is there is kept, what is missing is made, by as many processes as asked for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from argonne.data.cache.store import (
    INDEX,
    CachedUnit,
    TokenCache,
    cache_key,
    cut_spans,
    made_from,
    open_cache,
    write_sealed,
    writing,
)
from argonne.data.cache.units import Kept, Tally, UnitMaker, in_processes, in_this_process
from argonne.data.corpus.shards import OnBad, Shard
from argonne.data.errors import DataError
from argonne.data.tokens.filters import FILTERS, Filters
from argonne.files import TEMPORARY, lock, sync

TICK_SECONDS = 1.0
LINE_SECONDS = 30.0


def build_cache(
    shards: Sequence[Shard],
    tokenizer: PreTrainedTokenizerFast,
    boundary: tuple[int, int] | None,
    directory: Path,
    processes: int = 1,
    on_bad: OnBad = "raise",
    progress: bool = True,
    tick: Callable[[], object] | None = None,
    filters: Filters = FILTERS,
) -> TokenCache:
    """The cache of this corpus under `directory`: opened if it is complete, else built, or built on.

    The files are the same whatever the number of processes and however often the build was interrupted. A
    complete cache has its files' sizes checked and is not written to; what an earlier build left has its
    checksums checked too. Another process that builds the same cache is waited for.

    Args:
        boundary: the (BOS, EOS) ids put around each document, or None.
        directory: of all caches; this one is the directory in it that is named by its key.
        processes: processes that tokenise, at most; 1 starts none.
        on_bad: what becomes of a row group that cannot be read: "raise", or "skip" (its rows are counted as
            "unreadable"; a later build with "raise" tries them again).
        progress: show a bar on a terminal, or else print a line every half minute.
        tick: called about once a second, in this thread, while the build lasts; what it raises ends the
            build, which the same call takes up again.
        filters: which rows become documents; a cache that was made with others is another cache.

    Raises:
        DataError: what cannot be read or written, in one line, or that a process was killed.
    """
    if processes < 1:
        raise DataError(f"processes={processes} is not a positive number")
    recipe = made_from(shards, tokenizer, boundary, filters)
    path = directory / cache_key(recipe)
    if (cache := _finished(path, on_bad)) is not None:
        return cache
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    beat = _Beat(tick)
    with _alone(path, beat):
        if (cache := _finished(path, on_bad)) is not None:  # by the process that was waited for
            return cache
        with writing(path):
            (path / INDEX).unlink(missing_ok=True)
        dtype = "uint16" if _largest_id(tokenizer) < 1 << 16 else "uint32"
        backend = tokenizer.backend_tokenizer.to_str()
        maker = UnitMaker(path, tuple(shards), backend, boundary, dtype, on_bad == "skip", filters)
        units = _make_units(maker, processes, progress, beat)
        _complete(path, recipe, TokenCache(path, dtype, units))
    return open_cache(path)


def _make_units(maker: UnitMaker, processes: int, progress: bool, beat: _Beat) -> list[CachedUnit]:
    spans = cut_spans(maker.shards)
    processes = min(processes, len(spans))
    events = in_this_process(maker, spans) if processes == 1 else in_processes(maker, spans, processes)
    made: dict[str, CachedUnit] = {}
    rows = sum(sum(span.rows) for span in spans)
    with _Progress(rows, maker.path, progress) as shown, closing(events):
        for event in events:
            if isinstance(event, Tally):
                shown.add(event)
            else:
                unit = event.unit if isinstance(event, Kept) else event
                made[unit.span.name] = unit
                if isinstance(event, Kept):
                    shown.keep(unit)
            beat()
    return [made[span.name] for span in spans]


def _finished(path: Path, on_bad: OnBad) -> TokenCache | None:
    try:
        cache = open_cache(path)
    except DataError:
        return None
    return None if on_bad == "raise" and any(unit.unreadable for unit in cache.units) else cache


def _complete(path: Path, recipe: dict[str, object], cache: TokenCache) -> None:
    content = {
        "made_from": recipe,
        "dtype": cache.dtype.name,
        "tokens": cache.tokens,
        "documents": cache.documents,
        "dropped": cache.dropped,
        "units": [asdict(unit) for unit in cache.units],
    }
    with writing(path):
        for left in path.glob(f"*{TEMPORARY}"):  # of a build that was killed
            left.unlink()
        sync(path)  # the units' names are on the disk before the index that counts on them
        write_sealed(path / INDEX, content)
        sync(path)


def _largest_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Not the vocabulary's size less one: some tokenizers leave ids out."""
    return max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values())


@contextmanager
def _alone(path: Path, beat: _Beat) -> Iterator[None]:
    """Wait until no other process builds in `path`, and keep others out meanwhile."""
    with writing(path):
        file = (path / ".lock").open("a", encoding="utf-8")
    with file:
        if not lock(file):
            print(f"token cache {path} is being built by another process; waiting for it", flush=True)
            while not lock(file):
                time.sleep(0.2)
                beat()
        yield


class _Beat:
    """Calls `tick` when it is time."""

    def __init__(self, tick: Callable[[], object] | None) -> None:
        self._tick = tick
        self._next = time.monotonic()

    def __call__(self) -> None:
        if self._tick is not None and time.monotonic() >= self._next:
            self._tick()
            self._next = time.monotonic() + TICK_SECONDS


class _Progress:
    """A bar on a terminal; elsewhere a line at the beginning, now and then, and at the end."""

    def __init__(self, rows: int, path: Path, show: bool) -> None:
        self._rows, self._path = rows, path
        self._done = self._kept = self._documents = self._tokens = 0
        self._began = self._told = time.monotonic()
        self._bar = tqdm(
            total=rows,
            unit="row",
            unit_scale=True,
            dynamic_ncols=True,
            desc="tokenising",
            disable=None if show else True,
        )
        self._lines = show and self._bar.disable

    def __enter__(self) -> _Progress:
        self._say(f"tokenising {self._rows:,} rows, once, into {self._path}")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is None:
            self._line()

    def add(self, tally: Tally) -> None:
        if tally.note:
            tqdm.write(tally.note, file=sys.stderr)
        self._count(tally.rows, tally.documents, tally.tokens)

    def keep(self, unit: CachedUnit) -> None:
        self._kept += sum(unit.span.rows)
        self._bar.initial = self._kept  # not to be taken for the speed of this build
        self._count(sum(unit.span.rows), unit.documents, unit.tokens)

    def _count(self, rows: int, documents: int, tokens: int) -> None:
        self._done += rows
        self._documents += documents
        self._tokens += tokens
        self._bar.set_postfix_str(f"{self._documents:,} documents, {self._tokens:,} tokens", refresh=False)
        self._bar.update(rows)
        if time.monotonic() - self._told >= LINE_SECONDS:
            self._line()

    def _line(self) -> None:
        made = self._done - self._kept
        left = (time.monotonic() - self._began) * (self._rows - self._done) / made if made else 0.0
        eta = f", {tqdm.format_interval(left)} left" if left else ""
        self._say(
            f"{self._done:,} of {self._rows:,} rows tokenised: {self._documents:,} documents, "
            f"{self._tokens:,} tokens{eta}"
        )
        self._told = time.monotonic()

    def _say(self, line: str) -> None:
        if self._lines:
            print(line, flush=True)
