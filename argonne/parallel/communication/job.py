"""Joining a job and leaving it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from argonne.parallel.communication.collectives import barrier
from argonne.parallel.communication.environment import meeting, this_process
from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.communication.layout import Layout
from argonne.parallel.communication.rendezvous import meet
from argonne.parallel.communication.shutdown import wait_for_gloo
from argonne.parallel.errors import LayoutError

STARTUP_TIMEOUT = timedelta(minutes=10)
"""Rendezvous, loading and the first batch: machines start at different times and disks are slow."""
TRAINING_TIMEOUT = timedelta(minutes=5)
"""Once every rank is running, a collective that takes longer has lost a peer."""


def choose_device(kind: str) -> torch.device:
    """The device of this process for ``kind`` in ``cpu | cuda | auto``, bound by LOCAL_RANK.

    Raises:
        LayoutError: ``cuda`` is asked for and not there, or LOCAL_RANK has no GPU of its own.
    """
    if kind not in ("cpu", "cuda", "auto"):
        raise LayoutError(f"device={kind!r} is not known; legal: cpu, cuda, auto")
    available = torch.cuda.is_available()
    if kind == "cpu" or (kind == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise LayoutError("device='cuda' was asked for, but this machine has no CUDA device; legal: cpu, auto")
    here = this_process()
    # Ranks that were started by hand may not be told which of their node's they are.
    local_rank = here.rank % torch.cuda.device_count() if here.local_rank is None else here.local_rank
    if local_rank >= torch.cuda.device_count():
        raise LayoutError(
            f"LOCAL_RANK={local_rank} has no GPU of its own; this machine has {torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_groups(layout: Layout, device: torch.device) -> Iterator[ProcessGroups]:
    """Join the job that the launcher's environment describes; leave it cleanly at the end.

    Reads RANK, WORLD_SIZE, MASTER_ADDR [127.0.0.1] and MASTER_PORT [29500] (set by ``torchrun``, a scheduler
    or by hand); without them this process is the whole job. Gloo serves CPU tensors, NCCL those on GPUs.
    On an exception the groups are left as they are: a peer may be gone, and waiting for it would hang.
    """
    here = this_process()
    layout.require_world_size(here.world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if here.world_size == 1:
        yield ProcessGroups.single(device, layout)
        return
    options: dict[str, Any] = {"timeout": STARTUP_TIMEOUT, "rank": here.rank, "world_size": here.world_size}
    options["store"] = meet(here, meeting(), STARTUP_TIMEOUT)
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)
    groups = ProcessGroups.from_world(layout, device)
    yield groups
    barrier(groups.world)
    wait_for_gloo()
    dist.destroy_process_group()
