"""Whether a change of the code leaves every bit of training alone: digests of short runs, before and after.

``python -m benchmarks.unchanged --output before.json`` on the old commit, then with ``--against before.json`` on the
new one. The runs cover the demo, each axis and each schedule, and a resume; ``--keep DIR`` keeps the checkpoint that
the last run goes on from, and ``--source DIR`` takes it from an older commit. Digests are of one machine and one set of
versions: another processor may round differently.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.report import environment, table, write_json

ROOT = Path(__file__).parents[1]
EXACT = ("step", "tokens", "loss", "validation_loss", "learning_rate", "grad_norm", "batch_hash")
DEMO: dict[str, Any] = {
    "--preset": "demo",
    "--block-size": 256,
    "--initial-batch-size": 4,
    "--gradient-accumulation-steps": 1,
    "--learning-rate": 3e-3,
    "--min-learning-rate": 3e-4,
    "--warmup-steps": 30,
    "--total-steps": 600,
    "--save-interval": 150,
    "--stop-at-step": 60,
}
SMALL: dict[str, Any] = DEMO | {
    "--hidden-size": 64,
    "--intermediate-size": 160,
    "--num-attention-heads": 8,
    "--num-key-value-heads": 4,
    "--block-size": 64,
    "--gradient-accumulation-steps": 4,
    "--total-steps": 12,
    "--warmup-steps": 3,
    "--save-interval": 6,
    "--stop-at-step": 12,
}
BOTH = {"--tensor-parallel": 2, "--pipeline-parallel": 2}
PRECISE = {"--precision": "fp64"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "one process, bf16, document mask, recomputed": (1, {"--precision": "bf16", "--document-mask": None}),
    "TP 2 + SP": (2, {"--sequence-parallel": None}),
    "TP 2 x PP 2, 1f1b": (4, BOTH),
    "TP 2 x PP 2, interleaved": (4, BOTH | {"--pipeline-schedule": "interleaved"}),
    "TP 2 x PP 2, zb": (4, BOTH | {"--pipeline-schedule": "zb"}),
    "DP 2, replicate": (2, {"--data-parallel": 2}),
    "DP 2, zero1": (2, {"--data-parallel": 2, "--zero1": None}),
    "DP 2, fsdp": (2, {"--data-parallel": 2, "--fsdp": None}),
    "CP 2": (2, {"--context-parallel": 2}),
}


@dataclass(frozen=True)
class Options:
    """What is run, and what it is held against."""

    corpus: Path = ROOT / "runs" / "corpus"
    """The demo's shards (``make runs/corpus/ready``)."""
    output: Path | None = None
    """A JSON file for the digests."""
    against: Path | None = None
    """The digests of another commit: exit status 1 when one differs."""
    keep: Path | None = None
    """Keep here the run whose checkpoint the resume goes on from."""
    source: Path | None = None
    """Resume the run kept here by an older commit, instead of one made now."""


def train(directory: Path, processes: int, flags: dict[str, Any], driver: str = "pretrain") -> str:
    """Run a driver to its end; a digest of what it wrote to ``metrics.jsonl`` and of the tensors that it saved last."""
    words = [str(word) for pair in flags.items() for word in pair if word is not None]
    command = [sys.executable, str(ROOT / "examples" / f"{driver}.py"), "--nproc", str(processes), *words]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return digest(directory)


def digest(directory: Path) -> str:
    """SHA-256 of the exact fields of every step, and of the tensors of the newest checkpoint."""
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    newest = sorted(directory.glob("step_????????"))[-1]
    tensors = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))["tensors"]
    exact = [[step[name] for name in EXACT] for step in steps]
    hashes = sorted((name, record["sha256"]) for name, record in tensors.items())
    return hashlib.sha256(json.dumps([exact, hashes]).encode()).hexdigest()


def digests(options: Options, home: Path) -> dict[str, str]:
    """The digest of each run, by its name."""
    train_on = {"--data-glob": options.corpus / "train-*.parquet", "--device": "cpu"}
    held_out = {"--validation-glob": options.corpus / "held-out-*.parquet"}
    found: dict[str, str] = {}

    def add(name: str, directory: Path, processes: int, flags: dict[str, Any], driver: str = "pretrain") -> None:
        found[name] = train(directory, processes, flags, driver)
        print(f"{found[name][:16]}  {name}", flush=True)

    demo = home / "demo"
    add("demo, 60 steps at TP 2", demo, 2, {**DEMO, **train_on, **held_out, "--output-dir": demo})
    train_on["--tokenizer-path"] = demo / "tokenizer"
    for number, (name, (processes, flags)) in enumerate(LAYOUTS.items()):
        directory = home / f"layout-{number}"
        add(name, directory, processes, {**SMALL, **train_on, **held_out, **flags, "--output-dir": directory})

    first = options.source or home / "first"
    if options.source is None:
        train(first, 2, {**SMALL, **train_on, **PRECISE, "--output-dir": first, "--stop-at-step": 6})
    if options.keep is not None:
        shutil.copytree(first, options.keep)
    branch = home / "resumed"
    resumed = {"--checkpoint-path": first / "step_00000006", "--output-dir": branch, "--tensor-parallel": 1}
    add("resumed at TP 1 from TP 2", branch, 1, resumed, "resume")
    return found


def main(options: Options) -> int:
    with tempfile.TemporaryDirectory() as home:
        found = digests(options, Path(home))
    if options.output is not None:
        write_json(options.output, {**environment(torch.device("cpu")), "digests": found})
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text(encoding="utf-8"))["digests"]
    rows = [(name, "equal" if before.get(name) == value else "DIFFERS") for name, value in found.items()]
    print(table(("run", "bits"), rows))
    return int(any(verdict != "equal" for _, verdict in rows))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,))))
