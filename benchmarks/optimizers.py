"""AdamW against Muon on the demo: the held-out loss of each at the same learning rates, as ``make pretrain`` trains.

One run of ``examples/pretrain.py`` for each optimizer and rate, with the demo's flags but for these two and one process
(the demo is reproducible, so that its layout changes no bit). What was cut off goes on where it was; what is done is
read from its ``metrics.jsonl``. With fewer ``--steps`` the schedules are as much shorter.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from argonne.launch import guarded, parse
from argonne.parallel.legal import require_whole
from benchmarks.jobs import ROOT, metrics, run_until
from benchmarks.report import environment, table, write_json


@dataclass(frozen=True)
class Options:
    """What is compared."""

    corpus: Path = Path("runs/corpus")
    """Directory of the shards that ``examples/demo_corpus.py`` wrote."""
    runs: Path = Path("runs/optimizers")
    """Where the runs lie."""
    steps: int = 600
    """Of each run."""
    stop: int | None = None
    """Step at which to stop each run for now, and to compare; the same command with a later one goes on [the last]."""
    optimizers: tuple[Literal["adamw", "muon"], ...] = ("adamw", "muon")
    """Those that are compared."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3)
    """Peak learning rates; each run ends at a tenth of its own."""
    output: Path | None = None
    """A JSON file for the results [none]."""


def command(options: Options, optimizer: str, rate: float) -> tuple[Path, list[str]]:
    """The directory of a run, and its command: the flags of ``examples/demo.py``, but for these two."""
    directory = options.runs / f"{optimizer}-{rate:g}-{options.steps}"
    flags = {
        "--nproc": 1,
        "--preset": "demo",
        "--data-glob": options.corpus / "train-*.parquet",
        "--validation-glob": options.corpus / "held-out-*.parquet",
        "--block-size": 256,
        "--initial-batch-size": 4,
        "--gradient-accumulation-steps": 1,
        "--optimizer": optimizer,
        "--learning-rate": f"{rate:g}",
        "--min-learning-rate": f"{rate / 10:g}",
        "--warmup-steps": 30,
        "--total-steps": options.steps,
        "--stop-at-step": options.stop or options.steps,
        "--save-interval": 150,
        "--sample-tokens": 0,
        "--keep-checkpoints": 1,
        "--output-dir": directory,
    }
    switches = ["--disable-gradient-checkpointing", "--reproducible"]
    words = [str(word) for pair in flags.items() for word in pair]
    return directory, [sys.executable, str(ROOT / "examples" / "pretrain.py"), *words, *switches]


def held_out(directory: Path) -> dict[int, float]:
    """The held-out loss at each step at which it was measured."""
    return {m["step"]: m["validation_loss"] for m in metrics(directory) if m["validation_loss"] is not None}


def main(options: Options) -> int:
    """Train, and print the table; 0 if Muon's best is below AdamW's."""
    require_whole("steps", options.steps, 1)
    step = options.stop or options.steps
    require_whole("stop", step, 1, options.steps)
    options.runs.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[int, float]]] = {optimizer: [] for optimizer in options.optimizers}
    for rate in options.rates:
        for optimizer, found in results.items():
            directory, run = command(options, optimizer, rate)
            if step not in held_out(directory):
                run_until(run, directory, options.runs / f"{directory.name}.log", None)
            found.append(held_out(directory))
            print(f"{optimizer} at {rate:g}: {found[-1][step]:.4f} at step {step}", flush=True)
    last = {optimizer: [losses[step] for losses in found] for optimizer, found in results.items()}
    best = {optimizer: min(losses) for optimizer, losses in last.items()}
    rows = [[each, *(f"{loss:.4f}" for loss in last[each]), f"{best[each]:.4f}"] for each in last]
    print(table(["held-out loss", *(f"{rate:g}" for rate in options.rates), "best"], rows))
    if options.output is not None:
        measured = {"steps": options.steps, "learning_rates": options.rates, "held_out_losses": results}
        write_json(options.output, {**environment(torch.device("cpu")), **measured})
    return 0 if best.get("muon", 0.0) <= min(best.values()) else 1


if __name__ == "__main__":
    guarded(lambda: sys.exit(main(parse(Options, sys.argv[1:]))))
