"""What a teacher is worth: the held-out loss of a small student with one, and of the same student without.

Two runs with the same flags, seed, samples and tokenizer, side by side: ``examples/pretrain.py``, and
``examples/distill.py`` with its defaults. What was cut off goes on where it was; what is done is read from
``metrics.jsonl``. The held-out loss is the cross-entropy of the next token in both.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from argonne.launch import guarded, parse
from argonne.parallel.legal import require_whole
from argonne.parent import as_parent
from benchmarks.jobs import ROOT, metrics
from benchmarks.report import environment, table, write_json


@dataclass(frozen=True)
class Options:
    """The teacher, the text and how long."""

    teacher: Path
    """A directory with a model and its tokenizer."""
    corpus: Path = Path("runs/corpus")
    """Directory of the shards that ``examples/demo_corpus.py`` wrote."""
    runs: Path = Path("runs/distillation")
    """Where the runs lie."""
    steps: int = 200
    """Of each run."""
    output: Path | None = None
    """A JSON file for the results [none]."""


def command(options: Options, name: str) -> list[str]:
    """Of the run called ``name``: a student of some 10 million parameters, most of them in its vocabulary."""
    vocabulary = 49_152
    flags = {
        "--nproc": 1,
        "--device": "cpu",
        "--preset": "demo",
        "--hidden-size": 160,
        "--num-hidden-layers": 6,
        "--num-attention-heads": 5,
        "--num-key-value-heads": 5,
        "--intermediate-size": 448,
        "--vocab-size": vocabulary,
        "--tokenizer-path": options.teacher,
        "--data-glob": options.corpus / "train-*.parquet",
        "--validation-glob": options.corpus / "held-out-*.parquet",
        "--validation-sequences": 32,
        "--block-size": 128,
        "--initial-batch-size": 2,
        "--gradient-accumulation-steps": 1,
        "--learning-rate": 3e-3,
        "--min-learning-rate": 3e-4,
        "--warmup-steps": 20,
        "--total-steps": options.steps,
        "--save-interval": max(1, options.steps // 4),
        "--sample-tokens": 0,
        "--keep-checkpoints": 1,
        "--output-dir": options.runs / f"{name}-{options.steps}",
    }
    driver = "pretrain"
    if name == "teacher":
        driver, flags = "distill", {**flags, "--teacher-path": options.teacher}
    words = [str(word) for pair in flags.items() for word in pair]
    return [sys.executable, str(ROOT / "examples" / f"{driver}.py"), *words, "--disable-gradient-checkpointing"]


def main(options: Options) -> None:
    """Run both, and print what came of it."""
    require_whole("steps", options.steps, 4)
    names = ("alone", "teacher")
    with as_parent():
        jobs = [subprocess.Popen(command(options, name)) for name in names]
    if max([job.wait() for job in jobs]):
        sys.exit("a run has failed")
    found = {}
    for name in names:
        lines = metrics(options.runs / f"{name}-{options.steps}")
        found[name] = {str(line["step"]): line["validation_loss"] for line in lines if line["validation_loss"]}
    steps = list(found["alone"])
    print(
        table(
            ["held-out loss", *(f"step {step}" for step in steps)],
            [
                [
                    {"alone": "cross-entropy alone", "teacher": "with the teacher"}[name],
                    *(f"{found[name][s]:.3f}" for s in steps),
                ]
                for name in names
            ],
        )
    )
    gained = found["alone"][steps[-1]] - found["teacher"][steps[-1]]
    print(f"the teacher is worth {gained:.3f} nats of held-out loss at step {steps[-1]}")
    if options.output is not None:
        write_json(options.output, {"held_out_loss": found, "gained": gained, **environment(torch.device("cpu"))})


if __name__ == "__main__":
    guarded(lambda: main(parse(Options, sys.argv[1:])))
