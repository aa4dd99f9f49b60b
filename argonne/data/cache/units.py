"""Making the units of a token cache: in this process, or in several that are started for it."""

from __future__ import annotations

import os
import signal
import traceback
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from argonne.data.cache.store import CachedUnit, UnitRange, is_whole, padded, read_sealed, write_sealed, writing
from argonne.data.corpus.row_groups import RowGroups, Unit
from argonne.data.corpus.shards import Shard
from argonne.data.errors import DataError
from argonne.data.lanes.reader import cut_batches
from argonne.data.tokens.encoder import Encoder, batch_rows
from argonne.data.tokens.filters import FILTERS, UNREADABLE, Filters, tokenise_rows
from argonne.files import TEMPORARY
from argonne.parent import as_parent

IDLE_SECONDS = 1.0
"""How long a build waits for its processes before it says that it is still there."""


@dataclass(frozen=True)
class Tally:
    """Work done since the last one."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    note: str = ""
    """A line for people."""


@dataclass(frozen=True)
class Kept:
    """A unit that was there, whole, from a build before this one."""

    unit: CachedUnit


Event = Tally | Kept | CachedUnit


@dataclass(frozen=True)
class UnitMaker:
    """All that it takes to make any unit of one cache. It can be sent to another process."""

    path: Path
    shards: tuple[Shard, ...]
    backend: str
    """The tokenizer's backend as JSON: a class that came with the tokenizer need not be known elsewhere."""
    boundary: tuple[int, int] | None
    dtype: str
    skip_unreadable: bool
    filters: Filters = FILTERS

    def encoder(self) -> Encoder:
        """An encoder of this cache's tokenizer; one serves for all units."""
        return Encoder(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(self.backend)))

    def make(self, span: UnitRange, encode: Encoder) -> Generator[Event, None, None]:
        """Make a unit unless it is there; what is there counts only if its checksum holds.

        Yields:
            a Tally now and then, and last the CachedUnit that was written, or the one Kept.

        Raises:
            DataError: a row group cannot be read (unless these are skipped), or the cache not be written.
        """
        if (kept := self._kept(span)) is not None:
            yield Kept(kept)
            return
        final = self.path / f"{span.name}.bin"
        temporary = final.with_name(final.name + TEMPORARY)
        try:
            with writing(self.path), temporary.open("wb") as file:
                unit = yield from self._write(span, encode, file)
                file.flush()
                os.fsync(file.fileno())
            with writing(self.path):
                os.replace(temporary, final)
                write_sealed(final.with_suffix(".json"), asdict(unit))
        except DataError:
            temporary.unlink(missing_ok=True)  # a full disk is to have the space back
            raise
        yield unit

    def _kept(self, span: UnitRange) -> CachedUnit | None:
        content = read_sealed(self.path / f"{span.name}.json")
        unit = None if content is None else CachedUnit.from_dict(content)
        if unit is None or unit.span != span or (unit.unreadable and not self.skip_unreadable):
            return None
        return unit if is_whole(self.path, unit, np.dtype(self.dtype).itemsize, verify=True) else None

    def _write(self, span: UnitRange, encode: Encoder, file: IO[bytes]) -> Generator[Event, None, CachedUnit]:
        """Write one unit, and return what it is."""
        ends: list[int] = []
        rows: list[int] = []
        dropped: Counter[str] = Counter()
        unreadable: list[int] = []
        notes: list[str] = []
        row_groups = RowGroups(self.shards, "skip" if self.skip_unreadable else "raise", notes.append)
        tokens = crc = row = 0
        for group, count in enumerate(span.rows, span.first):
            if not row_groups.readable(span.shard, group):
                dropped[UNREADABLE] += count
                unreadable.append(group)
                row += count
                yield Tally(rows=count, note=notes[-1])
                continue
            texts = row_groups.rows(Unit(span.shard, group, 0, count), 0, batch_rows())
            for batch in cut_batches(texts, batch_rows()):
                before = tokens, len(ends)
                accepted = []
                for outcome in tokenise_rows(batch, encode, self.boundary, self.filters):
                    if isinstance(outcome, str):
                        dropped[outcome] += 1
                    else:
                        accepted.append(outcome.astype(self.dtype).tobytes())
                        tokens += len(outcome)
                        ends.append(tokens)
                        rows.append(row)
                    row += 1
                content = b"".join(accepted)
                file.write(content)
                crc = zlib.crc32(content, crc)
                yield Tally(len(batch), len(ends) - before[1], tokens - before[0])
        size = tokens * np.dtype(self.dtype).itemsize
        rest = b"\0" * (padded(size) - size) + np.array([*ends, *rows], dtype="<i8").tobytes()
        file.write(rest)
        return CachedUnit(span, tokens, len(ends), dict(dropped), tuple(unreadable), zlib.crc32(rest, crc))


def in_this_process(maker: UnitMaker, spans: Sequence[UnitRange]) -> Generator[Event, None, None]:
    """Make all units, one after the other, the tokenizer using its threads."""
    encode = maker.encoder()
    for span in spans:
        yield from maker.make(span, encode)


def in_processes(maker: UnitMaker, spans: Sequence[UnitRange], processes: int) -> Generator[Event, None, None]:
    """Make all units in `processes` processes of one thread each; an empty Tally comes when there is no news.

    They end when this generator is closed or fails, and with this process, or the thread that began this, however
    that ends.

    Raises:
        DataError: what went wrong in one of them, or that one was killed.
    """
    context = get_context("spawn")
    left = iter(spans)
    workers: dict[Connection, SpawnProcess] = {}
    started: list[SpawnProcess] = []
    try:
        with _interrupts_held_back(), as_parent():
            for _ in range(processes):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(maker, theirs), name="argonne-tokenise", daemon=True)
                process.start()
                theirs.close()
                started.append(process)
                workers[ours] = process
        for connection in list(workers):
            _next_span(workers, connection, left)
        while workers:
            ready = set(wait(list(workers), IDLE_SECONDS))
            for connection in [each for each in workers if each in ready]:
                try:
                    event = connection.recv()
                except (EOFError, OSError):
                    raise _lost(workers[connection]) from None
                if isinstance(event, BaseException):
                    raise event
                if not isinstance(event, Tally):
                    _next_span(workers, connection, left)
                yield event
            yield Tally()
    finally:
        for connection in workers:
            connection.close()
        for process in started:  # either idle, or busy with what nobody waits for
            process.terminate()
        for process in started:
            process.join()


def _next_span(workers: dict[Connection, SpawnProcess], connection: Connection, left: Iterator[UnitRange]) -> None:
    span = next(left, None)
    if span is None:
        del workers[connection]
        connection.close()
        return
    try:
        connection.send(span)
    except OSError:
        raise _lost(workers[connection]) from None


def _lost(process: SpawnProcess) -> DataError:
    process.join(timeout=5)
    code = process.exitcode
    how = f"ended with status {code}"
    if code is not None and code < 0:
        how = f"was killed by signal {-code}"
        if -code == signal.SIGKILL:
            how += ", as it is when memory runs out (fewer processes need less)"
    return DataError(f"a process that tokenises {how}; the same command goes on where it stopped")


def _serve(maker: UnitMaker, connection: Connection) -> None:
    """The life of a process that makes units: it ends with the connection."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # read when the tokenizer encodes its first batch
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pa.set_cpu_count(1)
    try:
        encode = maker.encoder()
        while True:
            for event in maker.make(connection.recv(), encode):
                connection.send(event)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except DataError as error:
        problem: Exception = error
    except Exception:  # no DataError: a fault of the program, wanted with all it says
        problem = RuntimeError(traceback.format_exc())
    try:
        connection.send(problem)
    except OSError:
        return


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, which the terminal sends to all: the first one ends them."""
    resource_tracker.ensure_running()  # starts with the first process otherwise, and then lets interrupts through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
