"""A run killed again and again and moved between layouts, beside one that nothing disturbed: ``docs/moved-run.png``.

``python -m benchmarks.moved_run`` trains a small model on the demo's text (``make runs/corpus/ready``) twice, which
takes a few minutes on two CPU cores. The first run is left alone. Of the second every process is killed (SIGKILL)
between two saves, five times, and the same command goes on in the next layout from what lies on the disk.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.jobs import metrics, run_until
from benchmarks.report import environment, table, write_json

ROOT = Path(__file__).parents[1]
TRAINING: dict[str, Any] = {
    "--preset": "demo",
    "--hidden-size": 128,
    "--intermediate-size": 384,
    "--num-attention-heads": 4,
    "--num-key-value-heads": 2,
    "--block-size": 128,
    "--initial-batch-size": 2,
    "--gradient-accumulation-steps": 4,
    "--learning-rate": 3e-3,
    "--min-learning-rate": 3e-4,
    "--warmup-steps": 20,
    "--save-interval": 15,
    "--sample-tokens": 8,
    "--device": "cpu",
}


@dataclass(frozen=True)
class Leg:
    """A part of the moved run: a layout, and the share of the run after which it is killed."""

    name: str
    processes: int
    flags: tuple[str, ...]
    until: float
    """Of all steps; the last leg runs to the end."""


LEGS = (
    Leg("TP 2", 2, ("--tensor-parallel", "2"), 0.16),
    Leg("TP 2", 2, ("--tensor-parallel", "2"), 0.32),
    Leg("TP 1", 1, ("--tensor-parallel", "1"), 0.48),
    Leg("DP 2", 2, ("--data-parallel", "2"), 0.64),
    Leg("PP 2", 2, ("--pipeline-parallel", "2"), 0.80),
    Leg("TP 2 + SP", 2, ("--tensor-parallel", "2", "--sequence-parallel"), 1.0),
)
"""The first change of processes keeps the layout, and so every bit; the others keep the run up to rounding."""


@dataclass(frozen=True)
class Options:
    """What is trained, and where the picture goes."""

    corpus: Path = ROOT / "runs" / "corpus"
    """The demo's shards."""
    steps: int = 200
    """Optimizer steps of each run."""
    picture: Path = ROOT / "docs" / "moved-run.png"
    """The picture."""
    output: Path = ROOT / "benchmarks" / "results" / "moved_run_cpu.json"
    """The figures behind it, as JSON."""


@dataclass(frozen=True)
class Comparison:
    """How far the moved run is from the undisturbed one."""

    equal_bits_until: int
    """The first steps, up to this one, have the same losses and gradient norms bit for bit."""
    largest_difference: float
    """Of the losses, in nats per token, over all steps."""
    at_step: int
    largest_relative_difference: float
    same_batches: bool
    """Whether every step saw the same tokens in the same order."""


def command(options: Options, leg: Leg, directory: Path, tokenizer: Path | None) -> list[str]:
    """The command line of one leg; with a ``tokenizer`` none is trained."""
    flags = {
        **TRAINING,
        "--total-steps": options.steps,
        "--data-glob": options.corpus / "train-*.parquet",
        "--output-dir": directory,
        **({} if tokenizer is None else {"--tokenizer-path": tokenizer}),
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--nproc", str(leg.processes), *words, *leg.flags]


def compare(undisturbed: Sequence[dict[str, Any]], moved: Sequence[dict[str, Any]]) -> Comparison:
    """The two runs, step by step."""
    pairs = list(zip(undisturbed, moved, strict=True))
    unequal = (one["step"] for one, other in pairs if any(one[name] != other[name] for name in ("loss", "grad_norm")))
    differences = [abs(one["loss"] - other["loss"]) for one, other in pairs]
    worst = max(range(len(pairs)), key=lambda index: differences[index])
    return Comparison(
        equal_bits_until=next(unequal, undisturbed[-1]["step"] + 1) - 1,
        largest_difference=differences[worst],
        at_step=undisturbed[worst]["step"],
        largest_relative_difference=max(d / one["loss"] for d, (one, _) in zip(differences, pairs, strict=True)),
        same_batches=all(one["batch_hash"] == other["batch_hash"] for one, other in pairs),
    )


def draw(
    undisturbed: Sequence[dict[str, Any]],
    moved: Sequence[dict[str, Any]],
    began: Sequence[int],
    killed: Sequence[int],
    names: Sequence[str],
    path: Path,
) -> None:
    """The picture: both losses above, their difference below, a band for each layout and a line for each kill.

    Args:
        undisturbed, moved: the lines of the two runs' ``metrics.jsonl``.
        began: the first step of each leg that stayed.
        killed: the last step that each leg but the last had logged; what it had not saved was done again.
        names: the layouts of the legs.
        path: the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [line["step"] for line in undisturbed]
    losses = [line["loss"] for line in undisturbed]
    above.plot(steps, losses, color="black", linewidth=3, alpha=0.25, label=f"undisturbed, {names[0]}")
    above.plot(steps, [line["loss"] for line in moved], color="tab:red", linewidth=0.9, label="killed and moved")
    gaps = [abs(one["loss"] - other["loss"]) for one, other in zip(undisturbed, moved, strict=True)]
    below.plot(steps, gaps, color="tab:red", linewidth=0.9)
    smallest = min((gap for gap in gaps if gap), default=1e-7)
    below.set_yscale("symlog", linthresh=smallest)
    below.set_ylim(bottom=-0.2 * smallest)
    below.set(xlabel="step", ylabel="difference")
    above.set(ylabel="loss (nats per token)")
    edges = [*began, steps[-1] + 1]
    for number, (name, (first, after)) in enumerate(zip(names, pairwise(edges), strict=True)):
        for axes in (above, below):
            axes.axvspan(first - 0.5, after - 0.5, color="tab:blue", alpha=0.05 + 0.07 * (number % 2), linewidth=0)
        above.text((first + after) / 2, 0.97, name, transform=above.get_xaxis_transform(), ha="center", va="top")
    for number, step in enumerate(killed):
        for axes in (above, below):
            label = "SIGKILL" if axes is above and not number else None
            axes.axvline(step, color="tab:blue", linestyle=":", linewidth=1, label=label)
    above.legend(loc="upper right", bbox_to_anchor=(1.0, 0.9))
    figure.savefig(path, dpi=120)


def main(options: Options) -> None:
    """Train both runs, draw them and write their figures."""
    began_at = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        alone, travelling, log = Path(home) / "undisturbed", Path(home) / "moved", Path(home) / "log"
        run_until(command(options, LEGS[0], alone, None), alone, log, None)
        print(f"undisturbed: {options.steps} steps at {LEGS[0].name}", flush=True)
        began, killed = [], []
        for leg in LEGS:
            last = None if leg is LEGS[-1] else round(leg.until * options.steps)
            steps_saved = [int(path.name.removeprefix("step_")) for path in travelling.glob("step_????????")]
            began.append(max(steps_saved, default=0) + 1)
            step = run_until(command(options, leg, travelling, alone / "tokenizer"), travelling, log, last)
            if last is not None:
                killed.append(step)
            end = "finished at" if last is None else "killed after"
            print(f"{leg.name}: from step {began[-1]}, {end} {step}", flush=True)
        undisturbed, moved = metrics(alone), metrics(travelling)
    found = compare(undisturbed, moved)
    names = [leg.name for leg in LEGS]
    draw(undisturbed, moved, began, killed, names, options.picture)
    report = {
        "benchmark": "moved_run",
        "environment": environment(torch.device("cpu")),
        "steps": options.steps,
        "layouts": names,
        "began": began,
        "killed": killed,
        "seconds": round(time.monotonic() - began_at, 1),
        **vars(found),
        "losses": {
            "undisturbed": [line["loss"] for line in undisturbed],
            "moved": [line["loss"] for line in moved],
        },
    }
    write_json(options.output, report)
    rows = [(name, str(value)) for name, value in vars(found).items()]
    print(table(("", "value"), rows))
    print(f"\nwritten: {options.picture}, {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
