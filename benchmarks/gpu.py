"""All that needs a GPU, in parts of eight minutes at most, on a machine that is lent for half an hour: ``make gpu``.

The first line that it prints says which part is to be run next, and so does the last. A part that was cut off goes on
with the cases that are missing; one that is done on such a GPU, with these versions and these sources, is not run again
(if ``--part`` asks for it, it shows what it found). The machine needs no internet, no git and no package but PyTorch:
see ``wheels.py``. With ``--rehearse`` every part runs at tiny sizes where there is no GPU: ``cpu`` on the processor,
Triton's programs in its interpreter; ``null`` on the GPU that computes nothing
(``python -m tests.null_gpu -m benchmarks.gpu --rehearse null``).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script

from argonne.parent import as_parent
from benchmarks import wheels
from benchmarks.gpu_parts import PARTS, Part
from benchmarks.gpu_plan import Machine, Plan, probe
from benchmarks.kept import ROOT, Kept

PART_MINUTES = 8.0
"""The longest that a part runs at a time."""
LEAST_MINUTES = 0.5
"""With less left of the budget no part is begun: it would be cut off while PyTorch is imported."""
GRACE = 10.0
"""Seconds between being asked to end and being ended."""


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal(message)


class Refusal(Exception):
    """What cannot be done here, in one line."""


def flags_of(words: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises ``Refusal``."""
    parser = _OneLine(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", help="one part, by its number or its name [all that are left]")
    parser.add_argument("--budget", type=float, default=28.0, help="minutes to run for [28]")
    parser.add_argument("--limit", type=float, default=PART_MINUTES, help="minutes that a part may run at a time [8]")
    parser.add_argument("--wheels", type=Path, help="directory of wheels for what this Python lacks")
    parser.add_argument("--results", type=Path, help="directory of the JSON files [benchmarks/results]")
    parser.add_argument("--anew", action="store_true", help="measure what has been measured once more")
    parser.add_argument("--plan", action="store_true", help="say what is done, and run nothing")
    parser.add_argument("--rehearse", choices=("cpu", "null"), help="tiny sizes, where there is no GPU")
    flags = parser.parse_args(words)
    for name in ("budget", "limit"):
        if not 0 < getattr(flags, name) < float("inf"):
            raise Refusal(f"{name}={getattr(flags, name)} is not legal; legal: a number of minutes, more than 0")
    return flags


def chosen(parts: Sequence[Part], name: str) -> Part:
    """The part of that number or name. Raises ``Refusal``."""
    if name.isdecimal() and 1 <= int(name) <= len(parts):
        return parts[int(name) - 1]
    if found := [part for part in parts if part.name == name]:
        return found[0]
    names = ", ".join(part.name for part in parts)
    raise Refusal(f"part={name!r} is not known; legal: 1 to {len(parts)}, or {names}")


def run_part(part: Part, plan: Plan, seconds: float) -> str:
    """Run it for so long at most. How that ended: ``done``, ``cut off``, or something with a status.

    Done is what has been measured to its end, whatever it found: the JSON counts its failures.
    """
    ends = time.monotonic() + seconds
    if part.output is not None:
        return _outcome(run(plan.words(part, 0), ends, plan), plan.is_done(part))
    told = {"benchmark": f"gpu: {part.name}"}
    kept = Kept(plan.path(part), plan.machine.identity, told, resume=True)
    for number in range(len(part.commands)):
        words = plan.words(part, number)
        if (name := " ".join(words)) in kept:
            continue
        began = time.monotonic()
        if (status := run(words, ends, plan)) != 0:
            return _outcome(status, False)
        kept.keep(name, {"seconds": time.monotonic() - began})
    kept.end()
    return "done"


def _outcome(status: int | None, done: bool) -> str:
    if done:
        return f"done, with status {status}" if status else "done"
    return "cut off, and goes on when it is run again" if status is None else f"failed with status {status}"


def run(words: Sequence[str], ends: float, plan: Plan) -> int | None:
    """Python with ``words``, until then; its exit status, None when it was cut off. No process of it is left."""
    print(f"$ python {' '.join(words)}", flush=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    if plan.rehearse == "cpu":
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    through = ["-m", "tests.null_gpu"] if plan.rehearse == "null" else []
    with as_parent():
        job = subprocess.Popen(
            [sys.executable, *through, *words],
            cwd=ROOT,
            env=os.environ | variables,
            preexec_fn=os.setpgrp,  # what it starts is ended with it
        )
    try:
        return job.wait(max(1.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(job)


def _end(job: subprocess.Popen[bytes]) -> None:
    """End it, and what it has left behind."""
    with suppress(ProcessLookupError):
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                job.wait(GRACE)
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def settle(directory: Path | None) -> str | None:
    """Have this process, and each that it starts, find what wheels of ``directory`` bring.

    Returns:
        What could not be installed.
    """
    if directory is None:
        return None
    site = ROOT / "runs" / "gpu-wheels"
    problem = wheels.install(directory, site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    return problem


def main(words: Sequence[str], parts: Sequence[Part] = PARTS, look: Callable[[], Machine] = probe) -> int:
    """Run what is left, or one part; the exit status, 1 if a part failed."""
    flags = flags_of(words)
    only = None if flags.part is None else chosen(parts, flags.part)
    problem, machine = settle(flags.wheels), look()
    if flags.rehearse is None and not machine.gpus:
        told = machine.problem or "torch.cuda.is_available() is False"
        raise Refusal(
            f"{told}; legal: a machine with an NVIDIA GPU and a PyTorch built for CUDA, or REHEARSE=cpu to see every "
            "part run without one"
        )
    ordinary = ROOT / "benchmarks" / "results" if flags.rehearse is None else ROOT / "runs" / "rehearsal"
    plan = Plan(parts, machine, (flags.results or ordinary).resolve(), flags.rehearse)
    if only is not None and (why := plan.obstacle(only)):
        raise Refusal(f"PART={parts.index(only) + 1} ({only.name}) {why}, which this machine lacks")
    if flags.anew:
        for part in [only] if only is not None else parts:
            plan.path(part).unlink(missing_ok=True)
    print(plan.headline(), flush=True)
    for line in filter(None, (problem, plan.missing())):
        print(line, flush=True)
    if flags.plan:
        print("\n".join(plan.lines()))
        return 0
    return _run_all([only] if only is not None else plan.left(), plan, flags)


def _run_all(waiting: list[Part], plan: Plan, flags: argparse.Namespace) -> int:
    """In order, and those that were cut off once more, while the budget lasts."""
    ends, status = time.monotonic() + 60 * flags.budget, 0
    once = flags.part is not None
    while waiting and ends - time.monotonic() >= 60 * min(LEAST_MINUTES, flags.limit):
        part = waiting.pop(0)
        began = time.monotonic()
        outcome = run_part(part, plan, min(60 * flags.limit, ends - began))
        if outcome.startswith("cut off") and not once:
            waiting.append(part)
        status |= not outcome.startswith(("done", "cut off")) or "status" in outcome
        minutes = (time.monotonic() - began) / 60
        print(f"PART={plan.parts.index(part) + 1} ({part.what}): {outcome}, after {minutes:.1f} min", flush=True)
    print(plan.headline(), flush=True)
    return status


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # so that what is running is ended first
    try:
        sys.exit(main(sys.argv[1:]))
    except Refusal as refusal:
        print(f"gpu: error: {refusal}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
