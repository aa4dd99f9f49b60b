"""All-reduces over PyTorch's symmetric memory, whose kernels read and write their peers' buffers directly.

Each variant (``torch.ops.symm_mem``) becomes its records, or a text beginning with "not available" which every rank
agrees on: whatever one of them raises is told to the others before the next collective. The kernels wait for
their peers without end, so the first use of each size is waited for with a deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from argonne.parallel import ProcessGroups
from argonne.parallel.communication.collectives import gather_objects
from benchmarks.collective_timing import (
    ALL_REDUCE,
    Budget,
    bandwidths,
    fill,
    measure,
    operand_patterns,
    unequal,
)
from benchmarks.memory import size_text

MULTICAST = "multimem_all_reduce_"
VARIANTS = ("one_shot_all_reduce", "two_shot_all_reduce_", MULTICAST)
"""One shot: each rank reads all of every peer's buffer. Two shots: its part, then it writes the sum to all.
Multicast: the switch adds and spreads (NVLink SHARP)."""

DEADLINE = 30.0
"""Seconds that a first call may take on the device; 1 GiB takes milliseconds."""

_UNFINISHED = "did not finish"


def time_symmetric_memory(
    sizes: Sequence[int], dtype: torch.dtype, budget: Budget, groups: ProcessGroups
) -> dict[str, list[dict[str, Any]] | str]:
    """Check and time every variant at each of ``sizes`` (bytes, ascending). Collective over the tensor axis."""
    buffer, problem = agreed(lambda: _allocate(sizes[-1], dtype, groups), groups)
    if buffer is None:
        return dict.fromkeys(VARIANTS, f"not available: {problem}")
    handle, problem = agreed(lambda: _rendezvous(buffer, groups), groups)
    if handle is None:
        return dict.fromkeys(VARIANTS, f"not available: {problem}")
    results: dict[str, list[dict[str, Any]] | str] = {}
    for variant in VARIANTS:
        if unfinished(results):  # that kernel holds the GPU still
            results[variant] = "not available: not tried after another variant did not finish"
        else:
            results[variant] = _variant(variant, buffer, handle, sizes, budget, groups)
    return results


def unfinished(results: dict[str, Any]) -> bool:
    """Whether a kernel never ended: the device cannot be used or left in order any more."""
    return any(isinstance(result, str) and _UNFINISHED in result for result in results.values())


def agreed(action: Callable[[], Any], groups: ProcessGroups) -> tuple[Any, str | None]:
    """``action()`` and None, or on every rank None and the reason why it failed on one of them."""
    result = problem = None
    try:
        result = action()
    except Exception as error:  # what may go wrong in a driver's newest corner has no common class
        problem = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    for rank, found in enumerate(gather_objects(problem, groups.tensor)):
        if found is not None:
            return None, found if rank == 0 else f"rank {rank}: {found}"
    return result, None


def _allocate(size: int, dtype: torch.dtype, groups: ProcessGroups) -> Tensor:
    if groups.device.type != "cuda":
        raise RuntimeError("symmetric memory is of CUDA devices")
    if dtype not in (torch.bfloat16, torch.float32):
        raise RuntimeError(f"its all-reduces take bfloat16 and float32, not {str(dtype).removeprefix('torch.')}")
    import torch.distributed._symmetric_memory as symmetric

    return symmetric.empty(size // dtype.itemsize, dtype=dtype, device=groups.device)


def _rendezvous(buffer: Tensor, groups: ProcessGroups) -> Any:
    import torch.distributed._symmetric_memory as symmetric

    group: Any = groups.tensor.group  # not None: there are two ranks or more
    handle = symmetric.rendezvous(buffer, group)
    if handle is None:
        raise RuntimeError("rendezvous gave no handle")
    return handle


def _operator(variant: str, handle: Any, groups: ProcessGroups) -> Callable[[Tensor], Tensor]:
    if variant == MULTICAST and not handle.multicast_ptr:
        raise RuntimeError("no multicast between these GPUs")
    operator = getattr(torch.ops.symm_mem, variant)
    group: Any = groups.tensor.group
    return lambda tensor: operator(tensor, "sum", group.group_name)


def _variant(
    variant: str, buffer: Tensor, handle: Any, sizes: Sequence[int], budget: Budget, groups: ProcessGroups
) -> list[dict[str, Any]] | str:
    operator, problem = agreed(lambda: _operator(variant, handle, groups), groups)
    if problem is not None:
        return f"not available: {problem}"
    records = []
    for size in sizes:
        piece = buffer[: size // buffer.element_size()]
        record, problem = agreed(partial(_time, variant, operator, piece, budget, groups), groups)
        if problem is not None:
            return f"not available: {problem} (at {size_text(size)})"
        records.append(record)
    return records


def _time(
    variant: str, operator: Callable[[Tensor], Tensor], buffer: Tensor, budget: Budget, groups: ProcessGroups
) -> dict[str, Any]:
    axis = groups.tensor
    patterns = operand_patterns(buffer, axis)
    fill(buffer, patterns[axis.rank])
    result = operator(buffer)
    _finish(groups.device)
    wrong = sum(gather_objects(unequal(result, torch.stack(patterns).sum(0)), axis))
    del result
    buffer.zero_()  # as in time_collective
    (timing,) = measure([lambda: operator(buffer)], budget, groups)
    size = buffer.numel() * buffer.element_size()
    return {
        "collective": variant,
        "bytes": size,
        "iterations": len(timing.seconds),
        **timing.fields(),
        **bandwidths(size, timing.median, ALL_REDUCE.bus_factor(axis.size)),
        "wrong": wrong,
    }


def _finish(device: torch.device) -> None:
    """Wait for the device, but not for ever: a kernel that waits for a lost peer never ends."""
    event = torch.cuda.current_stream(device).record_event()
    deadline = time.monotonic() + DEADLINE
    while not event.query():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{_UNFINISHED} within {DEADLINE:.0f} s")
        time.sleep(0.001)
