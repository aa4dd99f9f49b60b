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
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script

from argonne.kernels import Backend
from argonne.kernels.dispatch import interprets
from argonne.launch import guarded, parse
from argonne.parallel import ArgonneError, choose_device
from benchmarks import interpreter
from benchmarks.kept import Kept, where
from benchmarks.kernel_accuracy import SIZES, Line, sections
from benchmarks.kernel_contestants import contestants
from benchmarks.kernel_report import plot_ratios, show, show_accuracy
from benchmarks.kernel_targets import HOST_MICROSECONDS, KERNELS, Case, cases, small_cases
from benchmarks.kernel_timing import GraphTimer, Timer, WallTimer, host_microseconds, measure
from benchmarks.report import environment

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
    rehearse: bool = False
    """A small case of each instead, on any device: its times mean nothing."""
    resume: bool = False
    """Go on with what the output has of such a machine, with the same flags."""
    output: Path | None = None
    """The JSON to write [benchmarks/results/kernels_<device>.json; of the accuracy none]."""


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
    kind = "cuda" if device.type == "cuda" else "interpreter" if interprets() else "torch"
    if kind == "interpreter":
        interpreter.mend()
    kept = _kept(flags, device, flags.output, {"backend": backend, "sizes": kind})
    lines: list[Line] = []
    for name, section in sections(backend, device, SIZES[kind]):
        found = kept.measured(name, lambda section=section: [asdict(line) for line in section()])
        lines += [Line(**line) for line in found]
    show_accuracy(lines, environment(device), "interpreter" if kind == "interpreter" else backend)
    contract = [{**asdict(line), "held": line.held} for line in lines]
    broken = sum(not line.held for line in lines)
    kept.end(broken, backend=backend, contract=contract)
    if kept.path is not None:
        print(f"\nwritten: {kept.path}")
    return broken


def speed(flags: Flags, device: torch.device) -> None:
    """Time the kernels, print the tables, write JSON and plot; the JSON grows with every figure."""
    settings = {name: getattr(flags, name) for name in ("tokens", "dtype", "rounds", "rehearse", "kernel")}
    output = flags.output or Path(__file__).parent / "results" / f"kernels_{device.type}.json"
    kept = _kept(flags, device, output, settings, "liger-kernel")
    timer: Timer = GraphTimer(device, not flags.rehearse) if device.type == "cuda" else WallTimer()
    if interprets():
        interpreter.mend()
    began = time.monotonic()
    for kernel in flags.kernel:
        for number, case in enumerate(_cases(flags, kernel)):
            missing = [d for d in KERNELS[kernel] if _name(case, d) not in kept]
            if not missing and (number or _host_name(kernel) in kept):
                continue
            torch._dynamo.reset()  # else shapes of before count against the limit of recompilations
            entrants = contestants(case, compiler="aot_eager" if flags.rehearse else "inductor")
            for direction in missing:
                kept.keep(_name(case, direction), measure(case, direction, entrants, device, timer, flags.rounds))
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                print(f"[{time.monotonic() - began:5.0f} s] {kernel} {case.shape} {direction}", flush=True)
            if not number:
                kept.measured(_host_name(kernel), lambda c=case, e=entrants: _host(c, e, device, flags.rehearse))
    report = kept.end()
    show(report)
    plot = output.with_suffix(".png")
    drawn = plot_ratios(report, plot)
    print(f"\nwritten: {output}" + (f" and {plot}" if drawn else ""))
    if not drawn:
        print(f"note: no {plot.name}, because matplotlib is not installed")


def _cases(flags: Flags, kernel: str) -> list[Case]:
    return (small_cases if flags.rehearse else cases)(kernel, getattr(torch, flags.dtype), flags.tokens)


def _name(case: Case, direction: str) -> str:
    return f"{case.kernel} {direction} {case.shape}"


def _host_name(kernel: str) -> str:
    return f"{kernel} on the host"


def _kept(flags: Flags, device: torch.device, output: Path | None, settings: dict[str, Any], *packages: str) -> Kept:
    machine = environment(device)
    told = {"benchmark": "kernels", "environment": machine, **settings}
    return Kept(output, where(machine.get("gpu"), *packages) | {"settings": settings}, told, flags.resume)


def _host(case: Case, entrants: dict[str, Any], device: torch.device, rehearse: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"kernel": case.kernel, "target_us": HOST_MICROSECONDS}
    for name in ("argonne", "torch"):
        found[f"{name}_us"] = host_microseconds(case, entrants[name], device, *([1] if rehearse else []))
    return found | {"verdict": "met" if found["argonne_us"] <= HOST_MICROSECONDS else "missed"}


def main(flags: Flags) -> None:
    """Run what the flags say."""
    check(flags)
    device = choose_device(flags.device)
    if flags.accuracy:
        if broken := accuracy(flags, device):
            sys.exit(f"argonne: {broken} lines of the contract are broken")
        return
    if device.type != "cuda" and not flags.rehearse:
        raise ArgonneError(
            f"device={device.type!r} has no timings; legal: cuda. Accuracy has no such need: "
            "python -m benchmarks.kernels --accuracy"
        )
    speed(flags, device)


if __name__ == "__main__":
    guarded(lambda: main(parse(Flags, sys.argv[1:])))
