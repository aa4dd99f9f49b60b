"""A rank starts in little more than the time that importing torch takes."""

from __future__ import annotations

import subprocess
import sys

SLOW_TO_IMPORT = ["torch._dynamo", "torch.distributed.pipelining", "torch.distributed.fsdp", "transformers"]


def test_models_and_layers_bring_neither_the_compiler_nor_schedules_nor_fsdp() -> None:
    program = "import sys, argonne.models, argonne.parallel; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(SLOW_TO_IMPORT)
