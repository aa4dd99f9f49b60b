"""What a run tells while it goes on: ``metrics.jsonl``, the live line and the log lines."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from argonne.training.appended import AppendedFile
from argonne.training.machine import status_bytes
from argonne.training.plot import Outline

# Dense bf16 peak, FLOP/s, from the vendor's data sheets.
_PEAK = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The dense bf16 peak of ``device`` in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAK.items() if model in name), None)


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if (peak := status_bytes("VmHWM")) is not None:  # rusage's begins with that of the process that started this one
        return peak / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsLog:
    """``metrics.jsonl``: one JSON object for each optimizer step; and of all of them, what a plot needs."""

    def __init__(self, path: Path) -> None:
        self.file = AppendedFile(path)
        self.training, self.held_out = Outline(), Outline()
        self.named: dict[str, tuple[Outline, Outline]] = {}
        """Loss and bits per byte of each named held-out set."""

    def drop_after(self, step: int) -> bool:
        """Forget what an interrupted run wrote past the checkpoint from which it continues; whether it had.

        Called before anything is written: the plot begins with the lines that stay.
        """

        def stays(line: bytes) -> bool:
            try:
                record = json.loads(line)
                if record["step"] > step:
                    return False
                self._draw(record)
                return True
            except (ValueError, KeyError, TypeError):
                return False  # a line that the interruption cut short

        return self.file.keep(stays)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line. Raises ``OSError`` when it cannot be written; it is then written with a later one.

        A number that is not finite (held-out text may have one) is null: JSON has no word for it.
        """
        plain = _finite(record)
        self._draw(plain)
        self.file.append(json.dumps(plain, allow_nan=False) + "\n")

    def _draw(self, record: dict[str, Any]) -> None:
        for outline, field in ((self.training, "loss"), (self.held_out, "validation_loss")):
            if record.get("tokens") is not None and record.get(field) is not None:
                outline.add(record["tokens"], float(record[field]))
        for name, measured in (record.get("eval") or {}).items():
            outlines = self.named.setdefault(name, (Outline(), Outline()))
            for outline, field in zip(outlines, ("loss", "bits_per_byte"), strict=True):
                if record.get("tokens") is not None and measured[field] is not None:
                    outline.add(record["tokens"], float(measured[field]))


def _finite(value: Any) -> Any:
    """The same, with null for a number that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """The live line on a terminal, and a log line every ``interval`` steps everywhere."""

    def __init__(self, first: int, last: int, interval: int) -> None:
        self.interval = interval
        self.last = last
        self.began, self.first = time.monotonic(), first
        self.held_out = self.named = ""
        self.bar = tqdm(
            total=last,
            initial=first,
            unit="step",
            dynamic_ncols=True,
            disable=None,
            bar_format="{desc} {bar:20}",
        )

    def step(self, record: dict[str, Any]) -> None:
        line = self._line(record)
        self.bar.set_description_str(line, refresh=False)
        self.bar.update()
        if record["step"] % self.interval == 0 or record["step"] in (self.first + 1, self.last):
            self.say(line)

    def say(self, line: str) -> None:
        tqdm.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()

    def _line(self, record: dict[str, Any]) -> str:
        step = record["step"]
        seconds = (time.monotonic() - self.began) / max(1, step - self.first) * (self.last - step)
        left = tqdm.format_interval(seconds)
        at = record["data_position"]
        if record["validation_loss"] is not None:
            self.held_out = f" (held-out {record['validation_loss']:.4f})"
        if record.get("eval"):
            bits = {name: of["bits_per_byte"] for name, of in record["eval"].items()}
            shown = {name: "" if each is None else f", {each:.4f} b/B" for name, each in bits.items()}
            each = (f"{name} {of['loss']:.4f}{shown[name]}" for name, of in record["eval"].items())
            self.named = f" ({'; '.join(each)})"
        # Reading ahead hides the data pipeline; what it does not hide is worth a word.
        share = record["data_wait"] / record["step_time"]
        data = f" | waited {share:.0%} for data" if share >= 0.05 else ""
        mfu = "" if record["mfu"] is None else f" | MFU {record['mfu']:.1%}"
        return (
            f"step {step:,}/{self.last:,} | loss {record['loss']:.4f}{self.held_out}{self.named} | "
            f"{record['tokens']:,} tokens | lr {record['learning_rate']:.2e} | "
            f"{record['tokens_per_second']:,.0f} tokens/s{data}{mfu} | {record['memory_gib']:.1f} GiB | "
            f"sample {at['sample']:,}, {at['shard']} row {at['row']} token {at['token']} | ETA {left}"
        )
