"""The demonstration behind ``make pretrain``: a small model on real text, tensor parallel, in minutes.

It is ``examples/pretrain.py`` with flags chosen for two CPU cores; on a machine with GPUs the same command
uses up to two of them (NCCL, bf16).
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

from argonne.output import steady_output

HERE = Path(__file__).parent


def main(corpus: Path, output_dir: Path, steps: int = 600) -> int:
    """Train on ``corpus`` and say what to do next."""
    processes = 2 if torch.cuda.device_count() != 1 else 1
    flags = {
        "--nproc": processes,
        "--preset": "demo",
        "--data-glob": corpus / "train-*.parquet",
        "--validation-glob": corpus / "held-out-*.parquet",
        "--block-size": 256,
        "--initial-batch-size": 4,
        "--gradient-accumulation-steps": 1,
        "--learning-rate": 3e-3,
        "--min-learning-rate": 3e-4,
        "--warmup-steps": 30,
        "--total-steps": steps,
        "--save-interval": 150,
        "--log-interval": 25,
        "--output-dir": output_dir,
    }
    words = [str(word) for pair in flags.items() for word in pair] + ["--disable-gradient-checkpointing"]
    began = time.monotonic()
    status = subprocess.call([sys.executable, str(HERE / "pretrain.py"), *words])
    if status == 0:
        python, here = os.path.relpath(sys.executable), os.path.relpath(HERE)
        print(f"\nDone in {time.monotonic() - began:.0f} s. The loss is drawn in {output_dir / 'loss.png'}. Next:")
        resume = f"resume.py --nproc {processes} --checkpoint-path {output_dir} --total-steps {2 * steps}"
        print(f"  {python} {here}/{resume}")
        generate = f"generate.py --nproc {processes} --checkpoint-path {output_dir} --prompt 'My fellow citizens, '"
        print(f"  {python} {here}/{generate}")
    return status


if __name__ == "__main__":
    steady_output()
    sys.exit(tyro.cli(main))
