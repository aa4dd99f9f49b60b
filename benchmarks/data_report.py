"""What ``benchmarks/data_pipeline.py`` makes of its measurements: ratios, flatness of memory, the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.data_contestants import DATASETS, FAST, FAST_ALONE, GZIP, LINES, LOOP, SLOW, SLOW_ALONE, ZSTD
from benchmarks.report import table

_ALONE = {**dict.fromkeys((FAST, LINES, GZIP, ZSTD), FAST_ALONE), SLOW: SLOW_ALONE}
CONTROLS = {"tokenizer_alone": _ALONE, "datasets": DATASETS, "loop": LOOP}
"""What the ratios compare with: the pipeline with the tokenizer that is inside it, all with the others."""
WARM_UP = 0.1
"""Part of the samples of memory, the first, that tell of its start."""
KEPT_SAMPLES = 200
"""Samples of memory in the JSON, evenly taken."""


@dataclass
class Record:
    """What one contestant did."""

    tokens: list[int] = field(default_factory=list)
    """In each turn."""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of all its threads."""
    resident: list[int] = field(default_factory=list)
    """Bytes of its memory, sampled while it had its turns."""

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each turn."""
        return self.rates_in(len(self.tokens))

    def rates_in(self, parts: int) -> list[float]:
        """Tokens per second of as many equal parts of its turns."""
        turns = len(self.tokens) // parts
        return [
            sum(self.tokens[first : first + turns]) / sum(self.seconds[first : first + turns])
            for first in range(0, parts * turns, turns)
        ]


def spread(resident: Sequence[int]) -> dict[str, Any] | None:
    """How flat memory was after the start; None without samples.

    ``growth`` is the median of the last fifth of the run over that of the first: what would go on for ever.
    ``farthest_over_median`` is how far any sample is from the median: what row groups and lists that come and go do.
    """
    settled = resident[int(len(resident) * WARM_UP) :]
    if not settled:
        return None
    fifth = max(1, len(settled) // 5)
    step = -(-len(settled) // KEPT_SAMPLES)
    middle = median(settled)
    return {
        "growth": median(settled[-fifth:]) / median(settled[:fifth]) - 1,
        "farthest_over_median": max(max(settled) - middle, middle - min(settled)) / middle,
        "range_over_median": (max(settled) - min(settled)) / middle,
        "median_bytes": middle,
        "peak_bytes": max(resident),
        "samples": len(resident),
        "settled_bytes": list(settled[::step]),
    }


def summarise(records: dict[str, Record]) -> dict[str, dict[str, Any]]:
    """Medians over the turns, or rounds; a ratio is taken within each of them first."""

    def ratio(name: str, control: str | None) -> float | None:
        if control not in records:
            return None
        parts = min(len(records[name].tokens), len(records[control].tokens))
        pairs = zip(records[name].rates_in(parts), records[control].rates_in(parts), strict=True)
        return median(a / b for a, b in pairs)

    return {
        name: {
            "ratios": {
                kind: ratio(name, control.get(name) if isinstance(control, dict) else control)
                for kind, control in CONTROLS.items()
            },
            "tokens_per_second": {"median": median(record.rates), "best": max(record.rates), "turns": record.rates},
            "tokens": record.tokens,
            "cpu_seconds_per_million_tokens": 1e6 * sum(record.cpu_seconds) / sum(record.tokens),
            "memory": spread(record.resident),
        }
        for name, record in records.items()
    }


def show(found: dict[str, dict[str, Any]], machine: dict[str, Any], rounds: int) -> None:
    """The table."""
    print(f"\n{machine['cpu']}, {machine['cores']} cores; medians of {rounds} rounds")
    rows = []
    for name, own in found.items():
        memory = own["memory"]
        rows.append(
            (
                name,
                *("-" if ratio is None else f"{ratio:.2f}" for ratio in own["ratios"].values()),
                f"{own['tokens_per_second']['median']:,.0f}",
                f"{own['tokens_per_second']['best']:,.0f}",
                f"{own['cpu_seconds_per_million_tokens']:.2f}",
                *(("-",) * 3 if memory is None else (f"{memory['peak_bytes'] / 2**20:,.0f}", *percents(memory))),
            )
        )
    header = (
        "",
        "x tokenizer",
        "x datasets",
        "x loop",
        "tokens/s",
        "best",
        "CPU s/M tokens",
        "peak MiB",
        "growth",
        "+-",
    )
    print(table(header, rows))
    print(
        "CPU s/M: CPU seconds per million tokens. After the start, growth: of the median of its memory from the first"
    )
    print("fifth to the last; +-: how far its memory is from the median at most")


def percents(memory: dict[str, Any]) -> tuple[str, str]:
    """The flatness of memory, for people."""
    return f"{memory['growth']:+.1%}", f"{memory['farthest_over_median']:.1%}"
