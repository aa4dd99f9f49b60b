"""The same bits at any layout, shown: ``make prove``.

Trains one small model on the demo's text again and again with ``examples/pretrain.py --reproducible``, each time in
another layout, once killed (SIGKILL) and moved twice on the way. One row a run says what it ended with; the last line,
and the exit status, whether every run is the same one. It takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch

from argonne.checkpoint.format import faults, read_manifest, step_directory
from argonne.launch import guarded, parse
from argonne.launch.refusal import STOPPING
from argonne.parallel import ArgonneError
from argonne.parallel.legal import require_whole
from benchmarks.jobs import ROOT, metrics, run_until

LEAST_STEPS, MOST_STEPS = 6, 10_000
SAVE_EVERY = 3  # steps, of the run that is killed
GLOBAL_ACCUMULATION = 4  # micro-batches of a step, over all replicas
TRAINING: dict[str, Any] = {
    "--preset": "demo",
    "--hidden-size": 128,
    "--intermediate-size": 384,
    "--num-attention-heads": 8,
    "--num-key-value-heads": 4,
    "--block-size": 64,
    "--initial-batch-size": 2,
    "--learning-rate": 3e-3,
    "--warmup-steps": 3,
    "--sample-tokens": 0,
}


@dataclass(frozen=True)
class Place:
    """A layout."""

    name: str
    processes: int
    flags: tuple[str, ...] = ()
    replicas: int = 1


ALONE = Place("one process", 1)
TENSOR = Place("TP 2", 2, ("--tensor-parallel", "2"))
SEQUENCE = Place("TP 2 + SP", 2, (*TENSOR.flags, "--sequence-parallel"))
PIPELINE = Place("PP 2", 2, ("--pipeline-parallel", "2"))
_DATA = ("--data-parallel", "2")
ZERO1 = Place("DP 2, ZeRO-1", 2, (*_DATA, "--zero1"), 2)
PLACES = (
    ALONE,
    TENSOR,
    SEQUENCE,
    PIPELINE,
    Place("DP 2", 2, _DATA, 2),
    ZERO1,
    Place("DP 2, FSDP", 2, (*_DATA, "--fsdp"), 2),
    Place("TP 4", 4, ("--tensor-parallel", "4")),
    Place("TP 2 x PP 2", 4, (*TENSOR.flags, *PIPELINE.flags)),
)
MOVED = (SEQUENCE, ZERO1, PIPELINE)
"""Where the run that is killed goes on, one after the other."""


@dataclass(frozen=True)
class Options:
    """Train a small model in every layout, and say whether the bits are the same."""

    corpus: Path = ROOT / "runs" / "corpus"
    """Directory of the demo's shards."""
    steps: int = 20
    """Optimizer steps of each run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where: auto takes the GPUs where there are two or more."""


@dataclass(frozen=True)
class Outcome:
    """What a run ended with, whatever its layout and its files."""

    steps: tuple[tuple[float, float], ...]
    """Loss and gradient norm of each step."""
    tensors: str
    """SHA-256 over name, shape, dtype and content of all whole tensors: every weight, and both moments of each."""

    def row(self, name: str) -> str:
        """A row of the table."""
        loss, norm = self.steps[-1]
        return f"{name:<{WIDTH}}  {loss!r:<18}  {norm!r:<20}  {self.tensors}"


WIDTH = max(len(place.name) for place in PLACES) + 2


def check(options: Options) -> None:
    """Raise ``ArgonneError`` naming what cannot be shown."""
    require_whole("steps", options.steps, LEAST_STEPS, MOST_STEPS)
    if not list(options.corpus.glob("train-*.parquet")):
        raise ArgonneError(
            f"corpus={str(options.corpus)!r} has no train-*.parquet; legal: a directory that examples/demo_corpus.py "
            "wrote (make runs/corpus/ready)"
        )
    gpus = torch.cuda.device_count()
    if options.device == "cuda" and gpus < 2:
        raise ArgonneError(f"device='cuda' has {gpus} GPUs for layouts of 2 and 4 processes; legal: cpu, auto")


def device_of(options: Options) -> tuple[str, int]:
    """The device, and the most processes that a layout may have on it."""
    gpus = torch.cuda.device_count()
    if options.device == "cuda" or (options.device == "auto" and gpus >= 2):
        return "cuda", gpus
    return "cpu", max(place.processes for place in PLACES)


def command(options: Options, place: Place, directory: Path, tokenizer: Path | None, save_interval: int) -> list[str]:
    """The command line of a run, or of a part of one; with a ``tokenizer`` none is trained."""
    flags = {
        **TRAINING,
        "--nproc": place.processes,
        "--device": device_of(options)[0],
        "--gradient-accumulation-steps": GLOBAL_ACCUMULATION // place.replicas,
        "--total-steps": options.steps,
        "--save-interval": save_interval,
        "--data-glob": options.corpus / "train-*.parquet",
        "--output-dir": directory,
        **({} if tokenizer is None else {"--tokenizer-path": tokenizer}),
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--reproducible", *words, *place.flags]


def outcome(directory: Path, steps: int) -> Outcome:
    """What the run in ``directory`` ended with. Raises ``ArgonneError`` when its last checkpoint is damaged."""
    newest = step_directory(directory, steps)
    if found := faults(newest):
        raise ArgonneError(f"checkpoint {str(newest)!r} is damaged: {found[0]}")
    tensors = {name: vars(record) for name, record in read_manifest(newest).tensors.items()}
    return Outcome(
        tuple((line["loss"], line["grad_norm"]) for line in metrics(directory)),
        hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest(),
    )


def moved(options: Options, home: Path) -> tuple[str, Outcome]:
    """A run that is killed in each layout but the last: what happened, and what it ended with."""
    directory, told = home / "moved", []
    kills = sorted(random.sample(range(SAVE_EVERY, options.steps - 1), len(MOVED) - 1))
    for place, last in zip(MOVED, [*kills, None], strict=True):
        words = command(options, place, directory, home / ALONE.name / "tokenizer", SAVE_EVERY)
        step = run_until(words, directory, home / "log", last)
        told.append(place.name if last is None else f"{place.name}, killed after step {step}")
    return "; ".join(told), outcome(directory, options.steps)


def verdict(outcomes: dict[str, Outcome]) -> tuple[bool, str]:
    """Whether all are equal to the first, and a line that says so, or what is not."""
    (first, expected), *others = outcomes.items()
    for name, found in others:
        if found != expected:
            pairs = enumerate(zip_longest(found.steps, expected.steps), start=1)
            step = next((step for step, (one, other) in pairs if one != other), None)
            where = "in its weights or moments alone" if step is None else f"from step {step}"
            return False, f"NOT THE SAME: {name} differs from {first} {where}"
    return True, (
        f"the same bits: {len(outcomes)} runs have the same loss and gradient norm at each of {len(expected.steps)} "
        "steps, and end with the same weights and moments"
    )


def main(options: Options) -> int:
    """Train, show, and return the exit status."""
    check(options)
    for number in STOPPING:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    device, most = device_of(options)
    began, outcomes = time.monotonic(), {}
    print(f"{options.steps} steps on {device} in {len(PLACES)} layouts, and once killed and moved\n")
    print(
        f"{'':<{WIDTH}}  {'last loss':<18}  {'its gradient norm':<20}  SHA-256 of all weights and moments", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="argonne-prove-") as name:
        home = Path(name)
        for place in PLACES:
            if place.processes > most:
                print(f"{place.name:<{WIDTH}}  left out: it needs {place.processes} GPUs, here are {most}", flush=True)
                continue
            directory = home / place.name
            tokenizer = None if place is ALONE else home / ALONE.name / "tokenizer"
            run_until(command(options, place, directory, tokenizer, options.steps), directory, home / "log", None)
            outcomes[place.name] = outcome(directory, options.steps)
            print(outcomes[place.name].row(place.name), flush=True)
        told, outcomes["moved"] = moved(options, home)
        print(f"{outcomes['moved'].row('moved')}\n\nmoved: {told}")
    same, line = verdict(outcomes)
    print(f"{line} ({time.monotonic() - began:.0f} s)")
    return 0 if same else 1


if __name__ == "__main__":
    guarded(lambda: sys.exit(main(parse(Options, sys.argv[1:]))))
