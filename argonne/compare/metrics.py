"""``metrics.jsonl`` of two runs, step by step: the first that differs, and in what."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from argonne.compare.finding import Finding
from argonne.compare.ulp import distance, distance_told
from argonne.parallel.errors import ArgonneError

METRICS = "metrics.jsonl"
FIELDS = ("batch_hash", "tokens", "learning_rate", "loss", "grad_norm")
"""What is compared, causes before what follows from them. All else depends on the machine or the layout."""

Line = tuple[Any, ...]
"""The values of ``FIELDS`` at one step; None for what is not there."""


def compare_metrics(one: Path, other: Path) -> Iterator[Finding]:
    """The first step and field of two runs' directories that differ, of the steps that both have.

    Where a run begins later or ends earlier than the other, a finding says so, and it is no difference.

    Raises:
        ArgonneError: a ``metrics.jsonl`` cannot be read or has no step, or the two have no step in common.
    """
    a, b = read_metrics(one), read_metrics(other)
    common = sorted(a.keys() & b.keys())
    if not common:
        spans = " and ".join(f"{run} has {min(steps):,} to {max(steps):,}" for run, steps in ((one, a), (other, b)))
        raise ArgonneError(f"no step is in the {METRICS} of both runs: {spans}; legal: runs with a step in common")
    for verb, end in (("begins", min), ("ends", max)):
        if end(a) != end(b):
            yield Finding(f"{one} {verb} at step {end(a):,}, {other} at step {end(b):,}", differs=False)
    unequal = [step for step in common if _unequal(a[step], b[step])]
    steps = f"{len(common):,} steps ({common[0]:,} to {common[-1]:,})"
    if not unequal:
        yield Finding(f"equal: {', '.join(FIELDS)} of {steps}", differs=False)
        return
    step = unequal[0]
    first, *more = _unequal(a[step], b[step])
    told = _told(FIELDS[first], a[step][first], b[step][first])
    also = f"; there also {', '.join(FIELDS[each] for each in more)}" if more else ""
    yield Finding(f"step {step:,}: {told}{also}; {len(unequal):,} of {steps} differ")


def read_metrics(run: Path) -> dict[int, Line]:
    """The values of ``FIELDS`` at each step of a run's directory. A last line that is cut short is left out.

    Raises:
        ArgonneError: there is no such file, a line of it is of no step, or it has none.
    """
    path, found = run / METRICS, dict[int, Line]()
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                    found[int(record["step"])] = tuple(record.get(name) for name in FIELDS)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    if line.endswith("\n"):
                        raise ArgonneError(f"line {number:,} of {str(path)!r} is not that of a step") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArgonneError(f"{str(path)!r} cannot be read: {error}") from error
    if not found:
        raise ArgonneError(f"{str(path)!r} has no step; legal: the directory of a run that has taken one")
    return found


def _unequal(one: Line, other: Line) -> list[int]:
    """Which of ``FIELDS`` differ."""
    return [index for index, values in enumerate(zip(one, other, strict=True)) if _bits(values[0]) != _bits(values[1])]


def _bits(value: Any) -> Any:
    """A number as the bytes of a float64, so that -0.0 differs from 0.0, and NaN does not differ from itself."""
    return struct.pack("d", value) if isinstance(value, float) else value


def _told(name: str, one: Any, other: Any) -> str:
    values = " against ".join("none" if value is None else str(value) for value in (one, other))
    if name == "batch_hash":
        return f"batch_hash differs ({values}): the data differ"
    if not (_is_finite(one) and _is_finite(other)):
        return f"{name} differs ({values})"
    dtype = torch.float32 if name == "loss" and _is_float32(one) and _is_float32(other) else torch.float64
    return f"{name} differs ({values}) by {distance_told(distance(one, other, dtype), dtype)}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and value - value == 0


def _is_float32(value: float) -> bool:
    return torch.tensor(value, dtype=torch.float64).float().item() == value
