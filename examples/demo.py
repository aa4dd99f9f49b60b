"""The demonstration behind ``make pretrain``: a small model on real text, tensor parallel, in minutes.

It is ``examples/pretrain.py`` with flags chosen for two CPU cores; on a machine with GPUs the same command
uses up to two of them (NCCL, bf16).
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from argonne.launch import guarded, parse
from argonne.parallel.legal import require_whole
from argonne.parent import as_parent
from argonne.training.training_flags import MOST_STEPS

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Demo:
    """Train a small model on a corpus and say what to do next."""

    corpus: Path
    """Directory of the shards that ``demo_corpus.py`` wrote."""
    output_dir: Path
    """Directory of the run."""
    steps: int = 600
    """Optimizer steps of the whole run."""


def words(demo: Demo, processes: int) -> list[str]:
    """The flags of ``pretrain.py``, as the words of a command line."""
    flags = {
        "--nproc": processes,
        "--preset": "demo",
        "--data-glob": demo.corpus / "train-*.parquet",
        "--validation-glob": demo.corpus / "held-out-*.parquet",
        "--block-size": 256,
        "--initial-batch-size": 4,
        "--gradient-accumulation-steps": 1,
        "--learning-rate": 3e-3,
        "--min-learning-rate": 3e-4,
        "--warmup-steps": 30,
        "--total-steps": demo.steps,
        "--save-interval": 150,
        "--log-interval": 25,
        "--output-dir": demo.output_dir,
    }
    switches = ["--disable-gradient-checkpointing"]
    if not torch.cuda.is_available():  # where a step takes a tenth longer (docs/reproducibility.md)
        switches.append("--reproducible")
    return [str(word) for pair in flags.items() for word in pair] + switches


def main(demo: Demo) -> int:
    """Train, and say what to do next."""
    output_dir, steps = demo.output_dir, demo.steps
    require_whole("steps", steps, 1, MOST_STEPS // 2)
    processes = 2 if torch.cuda.device_count() != 1 else 1
    began = time.monotonic()
    with as_parent():
        training = subprocess.Popen([sys.executable, str(HERE / "pretrain.py"), *words(demo, processes)])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it saves first, and then both end
        signal.signal(number, lambda number, _: training.send_signal(number))
    status = training.wait()
    if status == 0:
        python, here = os.path.relpath(sys.executable), os.path.relpath(HERE)
        print(f"\nDone in {time.monotonic() - began:.0f} s. The loss is drawn in {output_dir / 'loss.png'}. Next:")
        resume = f"resume.py --nproc {processes} --checkpoint-path {output_dir} --total-steps {2 * steps}"
        print(f"  {python} {here}/{resume}")
        generate = f"generate.py --nproc {processes} --checkpoint-path {output_dir} --prompt 'My fellow citizens, '"
        print(f"  {python} {here}/{generate}")
    return status


if __name__ == "__main__":
    guarded(lambda: sys.exit(main(parse(Demo, sys.argv[1:]))))
