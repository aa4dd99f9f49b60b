"""Whether a benchmark's buffers fit: compared before the first of them is allocated."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from argonne.parallel import ArgonneError

USABLE = 0.9
"""Of what is free: the rest is for workspaces of the libraries and for everything else that runs."""


@dataclass(frozen=True)
class Need:
    """The memory of each rank that a flag decides: ``value * bytes_per_unit + fixed`` bytes."""

    field: str
    value: int
    bytes_per_unit: float
    fixed: int = 0
    step: int = 1
    """The largest legal value is named to this."""
    show: Callable[[int], str] = str
    """How the flag's values are written."""

    @property
    def bytes(self) -> int:
        return int(self.value * self.bytes_per_unit) + self.fixed


def require_memory(need: Need, available: int, sharers: int) -> None:
    """Raise ``ArgonneError`` naming the largest legal value unless ``need`` fits ``sharers`` times in ``available``."""
    share = int(available * USABLE / sharers)
    if need.bytes <= share:
        return
    legal = int((share - need.fixed) / need.bytes_per_unit) // need.step * need.step
    ranks = f"each of the {sharers} ranks here" if sharers > 1 else "this rank"
    raise ArgonneError(
        f"{need.field}={need.show(need.value)} needs {need.bytes / 2**30:.1f} GiB of memory for {ranks}, and "
        f"{available / 2**30:.1f} GiB are free; "
        + (f"legal: up to {need.show(legal)}" if legal >= 1 else "no value fits: use fewer ranks or smaller presets")
    )


def available_memory(device: torch.device) -> int:
    """Bytes free on the GPU, or on this host for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ranks_sharing(device: torch.device, world_size: int) -> int:
    """The ranks that share ``available_memory``: one on a GPU, every rank of this host on its CPU."""
    return 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def parse_size(field: str, text: str) -> int:
    """Bytes that ``text`` names: a whole number, with K, M, G or T behind it for powers of 1024."""
    number, power = text.strip().upper(), 0
    if number[-1:] in ("K", "M", "G", "T"):
        number, power = number[:-1], "KMGT".index(number[-1]) + 1
    if not number.isascii() or not number.isdigit() or int(number) < 1:
        raise ArgonneError(
            f"{field}={text!r} is not a size; legal: a whole number of bytes, or of K, M, G or T (of 1024)"
        )
    return int(number) * 1024**power


def size_text(size: int) -> str:
    """``size`` in bytes as ``parse_size`` reads it, in the largest unit that it is a whole number of."""
    for power, unit in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if size % 1024**power == 0:
            return f"{size // 1024**power}{unit}"
    return str(size)
