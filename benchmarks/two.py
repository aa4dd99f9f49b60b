"""What a benchmark of several processes starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from argonne.launch import LaunchFlags


@dataclass(frozen=True)
class TwoOnCpu(LaunchFlags):
    """How many processes are measured, and where: one alone has nothing to send."""

    nproc: int | None = None
    """Processes to start when not under torchrun [every GPU, or 2 on CPU]."""

    on_cpu: ClassVar[int] = 2
