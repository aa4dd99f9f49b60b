"""What a training step is made of: its most expensive kernels, the attention that ran, and what a CPU allocates."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MOST = 10
"""Kernels to name."""

ATTENTION = {
    "flash": "_scaled_dot_product_flash_attention",
    "memory-efficient": "_scaled_dot_product_efficient_attention",
    "cuDNN": "_scaled_dot_product_cudnn_attention",
    "overrideable": "_scaled_dot_product_fused_attention_overrideable",
    "math": "_scaled_dot_product_attention_math",
}
"""The operators that ``F.scaled_dot_product_attention`` chooses from; on a CPU flash's name ends in ``_for_cpu``."""

_SAYS_ATTENTION = ("attention", "flash", "fmha", "sdpa")
"""In the names of operators and of GPU kernels."""


@dataclass(frozen=True)
class StepProfile:
    """One step under the profiler, which makes it slower: only the shares are to be trusted."""

    kernels: list[dict[str, Any]]
    """The most expensive: name, calls, seconds, share of ``kernel_seconds``. JSON values."""
    kernel_seconds: float
    """Of all kernels and copies on a GPU; of all operators, without those they call, on a CPU."""
    attention_backend: str
    attention_kernels: list[str]
    """The names that say so: the operators, and the GPU's kernels."""
    allocated: int | None
    """The most bytes that the step held beyond what was there before it, on a CPU; None on a GPU, which counts
    itself. Of PyTorch's allocator: the scratch of its libraries is not in it."""


def profile_step(step: Callable[[], object], device: torch.device) -> StepProfile:
    """Run ``step`` once under the profiler."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, profile_memory=not on_gpu) as seen:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    averages = seen.key_averages()
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # An annotation (the optimizer makes one) is a bracket around kernels, and would count them twice.
    found = [e for e in averages if e.device_type == where and not e.is_user_annotation]
    micros = {e: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in found}
    total = sum(micros.values())
    kernels = [
        {"name": e.key, "calls": e.count, "seconds": micros[e] / 1e6, "share": micros[e] / total if total else 0.0}
        for e in sorted(found, key=lambda e: -micros[e])[:MOST]
    ]
    backend, names = attention_of(e.key for e in averages)
    return StepProfile(kernels, total / 1e6, backend, names, None if on_gpu else _most_allocated(seen))


def attention_of(names: Iterable[str]) -> tuple[str, list[str]]:
    """The backend of attention that operators or kernels of these names belong to, and those names."""
    told = sorted({name for name in names if any(word in name.lower() for word in _SAYS_ATTENTION)})
    ran = [backend for backend, operator in ATTENTION.items() if any(operator in name for name in told)]
    return " and ".join(ran) or "none of PyTorch's operators", told


def _most_allocated(seen: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if e.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]  # negative when freed
        most = max(most, held)
    return most
