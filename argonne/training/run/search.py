"""The largest micro-batch that there is memory for, from ``--initial-batch-size`` down to ``--min-batch-size``.

A new run looks for it before its own model is built. Each rank tries a step alone (``rehearsal``), so that none can be
left waiting for one whose memory has run out; after each size all tell each other how it went. The accumulation stays,
so that the size decides the global batch. What a run that is continued looks for is in ``refit``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Generic

from argonne.parallel import ProcessGroups
from argonne.parallel.communication.collectives import gather_objects
from argonne.parallel.communication.environment import this_process
from argonne.parallel.errors import ArgonneError
from argonne.training.config import RunConfig
from argonne.training.machine import GIB, free_bytes, resident_bytes, return_large_blocks
from argonne.training.run.batch import Flags, with_micro_batch
from argonne.training.run.file import Search
from argonne.training.run.job import log
from argonne.training.run.memory import Room, nothing_fits
from argonne.training.run.rehearsal import Rehearsed, random_streams_kept, rehearse
from argonne.training.run.reproducible import blocks_of, reproducible_identity
from argonne.training.run.rough import Rough
from argonne.training.run.setup import Workload


def room_of(config: RunConfig, groups: ProcessGroups) -> Room | None:
    """On a CPU what ``--memory-limit`` says, or this rank's share of what is free; None where neither is known."""
    import_module("torch._dynamo")  # as the first step does: it takes a seventh of a GiB
    own, asked = resident_bytes(), config.training.memory_limit
    if asked is not None:
        return Room(int(asked * GIB), own, "--memory-limit")
    free = free_bytes(groups.device)
    return None if free is None else Room(own + free // this_process().local_world_size, own, "what is free")


@dataclass(frozen=True)
class Fitting(Generic[Flags]):
    """What was found."""

    config: Flags
    """The flags that fit: of those that were tried."""
    takes: str
    """How much memory that is, in words; empty where nobody knows."""


@dataclass(frozen=True)
class _Told:
    """What a rank tells the others of a size."""

    rehearsed: Rehearsed | None = None
    problem: str | None = None
    """Why it could not be tried."""


def search(
    config: Flags, workload: Workload, groups: ProcessGroups, computes: bool | None = None
) -> tuple[Flags, Workload, Search | None]:
    """Find the micro-batch of a new run (collective): the flags and the workload with it, and what was found.

    The first rank says so where it is not the size that was asked for. ``computes``: steps are computed rather than
    counted, as is done on a GPU.

    Raises:
        ArgonneError: on every rank alike: none fits, or there is a limit and this model's memory cannot be counted.
    """
    initial = config.training.initial_batch_size
    found = largest([with_micro_batch(config, size) for size in sizes(config)], workload, groups, computes)
    size = initial if found is None else found.config.training.initial_batch_size
    if found is None or size == initial:
        return config, workload, None
    log(groups, _announcement(found, groups, initial))
    identity = replace(workload.identity, reproducible=reproducible_identity(found.config))
    return found.config, replace(workload, identity=identity), Search(initial, size)


def sizes(config: RunConfig) -> Iterator[int]:
    """The micro-batches that are tried, the largest first: halves, rounded down, and at last the smallest.

    In a reproducible run those whose tokens are canonical blocks.
    """
    training, blocks = config.training, blocks_of(config) or 1
    size = training.initial_batch_size
    while True:
        if size * config.data.block_size % blocks == 0:
            yield size
        if size <= training.min_batch_size:
            return
        size = max(size // 2, training.min_batch_size)


def largest(
    tried: Sequence[Flags],
    workload: Workload,
    groups: ProcessGroups,
    computes: bool | None = None,
    continued: bool = False,
) -> Fitting[Flags] | None:
    """The first of ``tried`` that fits on all ranks (collective); None where that cannot be found out.

    Where not even weights and moments fit, the sizes between are left out.

    Raises:
        ArgonneError: as of ``search``.
    """
    computes = groups.device.type == "cuda" if computes is None else computes
    room = None if computes else room_of(tried[0], groups)
    if not computes and room is None:
        return None
    waiting = list(tried)
    while waiting:
        config = waiting.pop(0)
        with random_streams_kept(groups.device):
            own = _try(config, workload, groups, room, is_last=not waiting)
        told = gather_objects(own, groups.world)
        if (problem := next((each.problem for each in told if each.problem is not None), None)) is not None:
            _without(tried[0], groups, problem)
            return None
        found = [each.rehearsed for each in told if each.rehearsed is not None]
        if all(each.fits for each in found):
            takes = ""
            if room is not None:
                most = room.own + max(each.needs for each in found)
                takes = f", in {most / GIB:.2f} of {room.limit / GIB:.2f} GiB a rank"
            return Fitting(config, takes)
        if any(each.state_alone for each in found):
            waiting = waiting[-1:]
    rank = next(number for number, each in enumerate(found) if not each.fits)
    of_rank = gather_objects(room, groups.world)[rank]
    raise nothing_fits(tried, groups, rank, found[rank], of_rank, continued)


def in_vain(config: RunConfig, settled: str | None) -> list[str]:
    """A line for ``--min-batch-size``, if this command names it and it does nothing.

    ``settled``: why the run has its micro-batch without a search; None where there is one.
    """
    if "min_batch_size" not in config.given:
        return []
    initial = config.training.initial_batch_size
    if settled is None and config.training.min_batch_size >= initial:
        settled = f"initial_batch_size={initial} is no more"
    return [] if settled is None else [f"note: --min-batch-size has no effect: {settled}"]


def _try(config: RunConfig, workload: Workload, groups: ProcessGroups, room: Room | None, is_last: bool) -> _Told:
    """Try a size on this rank, and count it where there is a ``room``; whatever becomes of it, the rank returns."""
    size = config.training.initial_batch_size
    try:
        rough = Rough.of(config, workload, groups, size)
        if surely_fits(rough, config, groups, room):
            return _Told(Rehearsed(True))
        if room is None:
            return _Told(rehearse(config, workload, groups, size))
        return_large_blocks()
        found = rehearse(config, workload, groups, size, room.for_tensors, computes=rough.is_quick)
        if is_last and not found.fits:  # to say what would be needed
            found = rehearse(config, workload, groups, size, math.inf)
        alone = (not found.fits and not found.state) or found.state > room.for_tensors
        return _Told(replace(found, fits=found.fits and found.needs <= room.for_tensors, state_alone=alone))
    except Exception as error:  # the others wait
        return _Told(problem=f"{type(error).__name__}: {error}".splitlines()[0][:200])


def surely_fits(rough: Rough, config: RunConfig, groups: ProcessGroups, room: Room | None) -> bool:
    """Whether so little is asked for that nothing has to be tried: half of what there is, by a bound far too high."""
    if room is not None:
        free = room.for_tensors
    else:
        free = min(free_bytes(groups.device) or 0, (config.training.memory_limit or math.inf) * GIB)
    return rough.most <= free / 2


def _without(config: RunConfig, groups: ProcessGroups, problem: str) -> None:
    """Go on with the size that was asked for, unless a limit was asked for too."""
    limit, size = config.training.memory_limit, config.training.initial_batch_size
    if limit is not None:
        raise ArgonneError(
            f"memory_limit={limit:g} cannot be kept, as the memory of this model's step cannot be counted ({problem}); "
            "legal: leave it out, and say the micro-batch that fits: --initial-batch-size"
        )
    log(groups, f"note: whether micro-batch {size} fits into memory could not be found out ({problem})")


def _announcement(found: Fitting[Flags], groups: ProcessGroups, initial: int) -> str:
    training, replicas = found.config.training, groups.data.size
    size, count = training.initial_batch_size, training.gradient_accumulation_steps
    return (
        f"micro-batch {size} of {initial} fits{found.takes}: the run's global batch is {size} x {count} micro-batches "
        f"x {replicas} replica{'s' if replicas > 1 else ''} = {size * count * replicas}"
    )
