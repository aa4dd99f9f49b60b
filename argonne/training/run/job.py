"""The processes of a run: joined, with its directory to themselves, and what the first of them prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from argonne.parallel import ProcessGroups, choose_device, process_groups
from argonne.parallel.communication.collectives import collectively
from argonne.parallel.communication.environment import this_process
from argonne.parallel.communication.shared_sums import sharing_sums
from argonne.parallel.errors import ArgonneError
from argonne.training.config import RunConfig
from argonne.training.machine import limit_gpu
from argonne.training.run.directory import claim
from argonne.training.run.reproducible import blocks_of, settle_process


@contextmanager
def joined(config: RunConfig) -> Iterator[ProcessGroups]:
    """The processes of the job, which has the run's directory to itself for as long as this lasts."""
    layout = config.parallel.layout(this_process().world_size)
    device, blocks = choose_device(config.launch.device), blocks_of(config)
    if blocks is not None:
        settle_process(device)
    with process_groups(layout, device) as groups:
        if config.training.memory_limit is not None and device.type == "cuda":
            limit_gpu(device, config.training.memory_limit)
        groups = sharing_sums(groups)
        groups = groups if blocks is None else groups.in_blocks(blocks)
        log(groups, *_told_of_sums(groups))
        directory = config.run.output_dir
        own = collectively(lambda: claim(directory) if groups.is_first else None, groups.world)
        try:
            yield groups
        except ArgonneError:
            if own is not None:
                own.undo()
            raise
        if own is not None:
            own.release()


def _told_of_sums(groups: ProcessGroups) -> list[str]:
    """A line, where the last bits of sums are others than where memory can be shared."""
    here = this_process().local_world_size == groups.world.size
    if groups.device.type != "cpu" or groups.reproducible or groups.tensor.size < 3 or groups.tensor.sums or not here:
        return []
    return [
        f"note: /dev/shm cannot be shared here. Gloo adds what the {groups.tensor.size} tensor-parallel ranks have, in "
        "another order: the last bits of sums are others than with it."
    ]


def log(groups: ProcessGroups, *lines: str) -> None:
    """Print from the first rank."""
    if groups.is_first:
        for line in lines:
            print(line, flush=True)
