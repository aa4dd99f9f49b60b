"""How right and how fast are the kernels? ``python -m benchmarks.kernels --accuracy``, or on a GPU without the flag.

``--accuracy``: each line of the numeric contract beside what plain torch gives in that dtype; on a GPU of the Triton
programs, on a CPU of the torch references, with TRITON_INTERPRET=1 of the Triton programs in the interpreter. The exit
status is 1 if a line is broken. Without it: times of each kernel beside torch, torch.compile and Liger-Kernel (where it
is installed), as fractions of what ``torch.clone`` reaches at as many bytes in the same run.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script

from argonne.kernels import Backend
from argonne.kernels.dispatch import interprets
from argonne.launch import guarded, parse
from argonne.parallel import ArgonneError, choose_device
from benchmarks import interpreter
from benchmarks.kernel_accuracy import SIZES, observe
from benchmarks.kernel_contestants import contestants
from benchmarks.kernel_report import plot_ratios, show, show_accuracy
from benchmarks.kernel_targets import HOST_MICROSECONDS, KERNELS, Case, cases
from benchmarks.kernel_timing import GraphTimer, host_microseconds, measure
from benchmarks.report import environment, write_json

FEWEST_TOKENS = 128


@dataclass(frozen=True)
class Flags:
    """What to measure."""

    accuracy: bool = False
    """Compare with float64 instead of the clock."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run [CUDA when there is one]."""
    kernel: tuple[str, ...] = tuple(KERNELS)
    """Which to time."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the activations that are timed."""
    tokens: int = 8192
    """Of each timed call; more than 4096 in multiples of it."""
    rounds: int = 20
    """Turns of each contestant."""
    output: Path | None = None
    """The JSON to write [benchmarks/results/kernels_cuda.json; of the accuracy none]."""


def check(flags: Flags) -> None:
    """Raise ``ArgonneError`` for what is not legal."""
    for name in flags.kernel:
        cases(name, torch.bfloat16, flags.tokens)
    if flags.tokens < FEWEST_TOKENS or (flags.tokens > 4096 and flags.tokens % 4096):
        raise ArgonneError(f"tokens={flags.tokens} is not legal; legal: {FEWEST_TOKENS} to 4096, or a multiple of 4096")
    if flags.rounds < 1:
        raise ArgonneError(f"rounds={flags.rounds} is not legal; legal: 1 or more")
    if flags.output is not None and flags.output.suffix != ".json":  # the plot beside it would take its place
        raise ArgonneError(f"output={str(flags.output)!r} is not a JSON file; legal: a path that ends in .json")


def accuracy(flags: Flags, device: torch.device) -> int:
    """Print the contract; the number of its lines that are broken."""
    backend: Backend = "triton" if device.type == "cuda" or interprets() else "torch"
    sizes = SIZES["cuda" if device.type == "cuda" else "interpreter" if interprets() else "torch"]
    if device.type == "cpu" and interprets():
        interpreter.mend()
    lines = list(observe(backend, device, sizes))
    show_accuracy(lines, environment(device), backend if device.type == "cuda" or backend == "torch" else "interpreter")
    if flags.output is not None:
        found = [{**asdict(line), "held": line.held} for line in lines]
        write_json(
            flags.output,
            {"benchmark": "kernels", "environment": environment(device), "backend": backend, "contract": found},
        )
        print(f"\nwritten: {flags.output}")
    return sum(not line.held for line in lines)


def speed(flags: Flags, device: torch.device) -> None:
    """Time the kernels, print the tables, write JSON and plot; the JSON grows with every figure."""
    began = time.monotonic()
    output = flags.output or Path(__file__).parent / "results" / "kernels_cuda.json"
    report: dict[str, Any] = {
        "benchmark": "kernels",
        "environment": environment(device) | {"triton": _version("triton"), "liger-kernel": _version("liger-kernel")},
        "tokens": flags.tokens,
        "dtype": flags.dtype,
        "rounds": flags.rounds,
        "records": [],
        "host": [],
    }
    timer = GraphTimer(device)
    for kernel in flags.kernel:
        for number, case in enumerate(cases(kernel, getattr(torch, flags.dtype), flags.tokens)):
            torch._dynamo.reset()  # else shapes of before count against the limit of recompilations
            entrants = contestants(case)
            for direction in KERNELS[kernel]:
                report["records"].append(measure(case, direction, entrants, device, timer, flags.rounds))
                gc.collect()
                torch.cuda.empty_cache()
                write_json(output, report)
                print(f"[{time.monotonic() - began:5.0f} s] {kernel} {case.shape} {direction}", flush=True)
            if not number:
                report["host"].append(_host(case, entrants, device))
    write_json(output, report)
    show(report)
    plot = output.with_suffix(".png")
    drawn = plot_ratios(report, plot)
    print(f"\nwritten: {output}" + (f" and {plot}" if drawn else ""))
    if not drawn:
        print(f"note: no {plot.name}, because matplotlib is not installed")


def _host(case: Case, entrants: dict[str, Any], device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"kernel": case.kernel, "target_us": HOST_MICROSECONDS}
    for name in ("argonne", "torch"):
        found[f"{name}_us"] = host_microseconds(case, entrants[name], device)
    return found | {"verdict": "met" if found["argonne_us"] <= HOST_MICROSECONDS else "missed"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(flags: Flags) -> None:
    """Run what the flags say."""
    check(flags)
    device = choose_device(flags.device)
    if flags.accuracy:
        if broken := accuracy(flags, device):
            sys.exit(f"argonne: {broken} lines of the contract are broken")
        return
    if device.type != "cuda":
        raise ArgonneError(
            f"device={device.type!r} has no timings; legal: cuda. Accuracy has no such need: "
            "python -m benchmarks.kernels --accuracy"
        )
    speed(flags, device)


if __name__ == "__main__":
    guarded(lambda: main(parse(Flags, sys.argv[1:])))
