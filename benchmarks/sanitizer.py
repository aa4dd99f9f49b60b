"""The kernels under NVIDIA's compute-sanitizer: accesses out of bounds, and races. ``python -m benchmarks.sanitizer``

A case is one tool over some tests of ``tests/kernels/test_gpu.py``: odd widths in bfloat16, as everything takes 10 to
100 times as long there. PyTorch's own allocator is off: it would hand out memory in which what lies behind a tensor's
end is legal.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script

from benchmarks.kept import ROOT, Kept, sources, where

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck")
TESTS = {
    "norms": "test_rms_norm and dtype1 and (81 or 8200)",
    "rope": "test_rope and dtype1 and (81 or 170)",
    "swiglu": "test_swiglu and dtype1",
    "loss": "test_cross_entropy and dtype1 and 81",
}
"""Names for ``pytest -k``; ``dtype1`` is bfloat16."""
FOUND = 9
"""The exit status when the tool has something to say."""


def find() -> str | None:
    """The tool: on the path, or where CUDA lies."""
    return shutil.which(TOOL) or shutil.which(TOOL, path="/usr/local/cuda/bin")


def case(tool: list[str], check: str, names: str) -> dict[str, Any]:
    """Run one; JSON values."""
    before = [*tool, "--tool", check, "--error-exitcode", str(FOUND), "--print-limit", "20"] if tool else []
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/test_gpu.py", "-k", names]
    began = time.monotonic()
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*before, *tests], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    said = (done.stdout + done.stderr).splitlines()
    summary = [line.strip("= ") for line in said if re.search(r"SUMMARY: |\d+ (passed|failed|skipped)", line)]
    return {
        "status": done.returncode,
        "found": {0: "nothing", FOUND: "errors"}.get(done.returncode, "the tests failed"),
        "summary": summary,
        "said": said[-40:] if done.returncode else [],
        "seconds": time.monotonic() - began,
    }


def main(words: list[str]) -> int:
    """Run what is missing; the exit status, 1 if anything was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "sanitizer_cuda.json")
    parser.add_argument("--resume", action="store_true", help="leave out what the output has of this machine")
    parser.add_argument("--rehearse", action="store_true", help="one case, without the tool")
    flags = parser.parse_args(words)
    tool = find()
    if tool is None and not flags.rehearse:
        print(f"sanitizer: error: {TOOL} is not found; legal: on the PATH, or in /usr/local/cuda/bin", file=sys.stderr)
        return 2
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    identity = where(gpu) | {"tests": sources("tests"), "selected": TESTS}
    kept = Kept(flags.output, identity, {"benchmark": "sanitizer"}, flags.resume)
    chosen = [] if flags.rehearse or tool is None else [tool]
    for check in CHECKS[:1] if flags.rehearse else CHECKS:
        for name, names in list(TESTS.items())[: 1 if flags.rehearse else None]:
            found = kept.measured(f"{check}: {name}", lambda c=check, n=names: case(chosen, c, n))
            told = "; ".join(found["summary"]) or "no summary"
            print(f"{check:<10} {name:<8} {found['found']} in {found['seconds']:.0f} s: {told}", flush=True)
            print("\n".join(found["said"]), end="\n" if found["said"] else "", flush=True)
    failures = sum(found["status"] != 0 for found in kept.cases.values())
    kept.end(failures)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
