"""How much memory this process has, and how much more there is for it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from argonne.parallel.errors import ArgonneError

GIB = 2**30
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")


def status_bytes(field: str) -> int | None:
    """What Linux says of this process: ``VmRSS`` (resident now), ``VmHWM`` (at its most); None on other systems."""
    return _kilobytes(_PROC / "self" / "status", field)


def resident_bytes() -> int:
    """Memory that this process has now; 0 where the system does not tell."""
    return status_bytes("VmRSS") or 0


def free_bytes(device: torch.device) -> int | None:
    """Memory that ``device`` has left for all of its processes; None where it does not tell.

    On a CPU that is what the kernel can give without swapping, and within the limits of this process's control groups.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_kilobytes(_PROC / "meminfo", "MemAvailable"), *_left_in_groups()]
    known = [each for each in found if each is not None]
    return max(0, min(known)) if known else None


def return_large_blocks() -> None:
    """Have memory of a megabyte and more go back to the system as soon as a tensor is freed, where glibc allocates it.

    As it comes, glibc keeps what it thinks will be wanted again, up to 32 MB at a time: a process may then have twice
    what its tensors need. One that was started to keep more (``argonne/launch/allocation.py``) does not from here on.
    """
    with suppress(OSError, AttributeError):  # another library
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 1 << 20)
        library.mallopt(_TRIM_THRESHOLD, 1 << 20)
        library.malloc_trim(0)


def limit_gpu(device: torch.device, gib: float) -> None:
    """Let this process allocate no more than ``gib`` GiB of a GPU.

    Raises:
        ArgonneError: that is more than it has.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    if gib * GIB > total:
        raise ArgonneError(f"memory_limit={gib:g} is more than the GPU has; legal: at most {total / GIB:.2f}")
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total, device)


def _kilobytes(path: Path, field: str) -> int | None:
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _left_in_groups() -> Iterator[int]:
    """What each control group (version 2) above this process, a container's say, has left."""
    if sys.platform != "linux":
        return
    with suppress(OSError, ValueError):
        own = next(
            line[3:]
            for line in (_PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
            if line.startswith("0::")
        )
        place = _GROUPS / own.lstrip("/")
        for group in (place, *place.parents):
            if not group.is_relative_to(_GROUPS):
                return
            if (left := _left_in(group)) is not None:
                yield left


def _left_in(group: Path) -> int | None:
    with suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text(encoding="utf-8"))  # "max" is none
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        # Pages of files that nobody reads now are given back when they are wanted.
        files = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return limit - int((group / "memory.current").read_text(encoding="utf-8")) + files
    return None
