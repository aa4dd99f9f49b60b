"""The largest micro-batch that there is memory for, from ``--initial-batch-size`` down to ``--min-batch-size``.

A new run looks for it before its own model is built. Each rank tries a step alone (``rehearsal``), so that none can be
left waiting for one whose memory has run out; after each size all tell each other how it went. The accumulation stays,
so that the size decides the global batch. It is kept with the run, which never looks for another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from argonne.models import Execution
from argonne.parallel import ProcessGroups
from argonne.parallel.communication.collectives import gather_objects
from argonne.parallel.communication.environment import this_process
from argonne.parallel.errors import ArgonneError
from argonne.training.config import RunConfig
from argonne.training.machine import GIB, free_bytes, resident_bytes
from argonne.training.run.batch import with_micro_batch
from argonne.training.run.file import Search
from argonne.training.run.job import log
from argonne.training.run.memory import what_helps
from argonne.training.run.rehearsal import Rehearsed, micro_batches, random_streams_kept, rehearse
from argonne.training.run.reproducible import blocks_of, reproducible_identity
from argonne.training.run.setup import Workload

USABLE = 0.9
"""Of a limit on a CPU, what the interpreter and tensors may take: the rest is for what is not counted, such as text
that is being read, an operator's own room, and gaps between blocks of memory."""


@dataclass(frozen=True)
class Room:
    """The memory that a rank may use on a CPU."""

    limit: int
    """Bytes of the process."""
    own: int
    """Those that it has already: the interpreter, and what it has read."""

    @classmethod
    def of(cls, config: RunConfig, groups: ProcessGroups) -> Room | None:
        """What ``--memory-limit`` says, or this rank's share of what is free; None where neither is known."""
        own, asked = resident_bytes(), config.training.memory_limit
        if asked is not None:
            return cls(int(asked * GIB), own)
        free = free_bytes(groups.device)
        return None if free is None else cls(own + free // this_process().local_world_size, own)

    @property
    def for_tensors(self) -> float:
        """Bytes."""
        return USABLE * self.limit - self.own


@dataclass(frozen=True)
class _Told:
    """What a rank tells the others of a size."""

    rehearsed: Rehearsed | None = None
    problem: str | None = None
    """Why it could not be tried."""


def search(
    config: RunConfig, workload: Workload, groups: ProcessGroups, computes: bool | None = None
) -> tuple[RunConfig, Workload, Search | None]:
    """Find the micro-batch of a new run (collective): the flags and the workload with it, and what was found.

    The first rank says so where it is not the size that was asked for. ``computes``: steps are computed rather than
    counted, as is done on a GPU.

    Raises:
        ArgonneError: on every rank alike: none fits, or there is a limit and this model's memory cannot be counted.
    """
    computes = groups.device.type == "cuda" if computes is None else computes
    room, initial = None if computes else Room.of(config, groups), config.training.initial_batch_size
    if not computes and room is None:
        return config, workload, None
    for size in sizes(config):
        with random_streams_kept(groups.device):
            own = _try(config, workload, groups, size, room)
        told = gather_objects(own, groups.world)
        if (problem := next((each.problem for each in told if each.problem is not None), None)) is not None:
            _without(config, groups, problem)
            return config, workload, None
        found = [each.rehearsed for each in told if each.rehearsed is not None]
        if all(each.fits for each in found):
            if size == initial:
                return config, workload, None
            config = with_micro_batch(config, size)
            identity = replace(workload.identity, reproducible=reproducible_identity(config))
            log(groups, _announcement(config, groups, initial, found, room))
            return config, replace(workload, identity=identity), Search(initial, size)
    raise _nothing_fits(config, groups, size, found, gather_objects(room, groups.world))


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


def in_vain(config: RunConfig, groups: ProcessGroups, begins: bool) -> list[str]:
    """A line for each flag of the search that does nothing though this command names it; ``begins``: a new run."""
    settled, initial = "the micro-batch of a run is settled as it begins", config.training.initial_batch_size
    found = []
    if "min_batch_size" in config.given and (not begins or config.training.min_batch_size >= initial):
        found.append(("--min-batch-size", f"initial_batch_size={initial} is no more" if begins else settled))
    if "memory_limit" in config.given and not begins and groups.device.type == "cpu":
        found.append(("--memory-limit", settled))
    return [f"note: {flag} has no effect: {why}" for flag, why in found]


def _try(config: RunConfig, workload: Workload, groups: ProcessGroups, size: int, room: Room | None) -> _Told:
    """Try a size on this rank, and count it where there is a ``room``; whatever becomes of it, the rank returns."""
    try:
        if surely_fits(config, workload, groups, size, room):
            return _Told(Rehearsed(True))
        if room is None:
            return _Told(rehearse(config, workload, groups, size))
        # Of the smallest all is counted, to say what would be needed.
        is_last = size <= config.training.min_batch_size
        found = rehearse(config, workload, groups, size, math.inf if is_last else room.for_tensors)
        return _Told(replace(found, fits=found.fits and found.needs <= room.for_tensors))
    except Exception as error:  # the others wait
        return _Told(problem=f"{type(error).__name__}: {error}".splitlines()[0][:200])


def surely_fits(config: RunConfig, workload: Workload, groups: ProcessGroups, size: int, room: Room | None) -> bool:
    """Whether so little is asked for that nothing has to be tried: half of what there is, by a bound far too high.

    Of each parameter eight copies, and one more for each gradient that a tree of sums keeps; for each token eight
    times what all matrices take and give; the scores of 64 heads.
    """
    if room is not None:
        free = room.for_tensors
    else:
        free = min(free_bytes(groups.device) or 0, (config.training.memory_limit or math.inf) * GIB)
    precision, plan = workload.precision, config.parallel.plan(groups.layout)
    with torch.device("meta"):
        model = workload.model.build(Execution(groups, precision, config.training.kernels, plan))
    parameters = [sharded.parameter for sharded in model.sharded_parameters()]
    accumulation = config.training.gradient_accumulation_steps
    copies = 8 + accumulation.bit_length()
    state = copies * precision.parameters.itemsize * sum(parameter.numel() for parameter in parameters)
    widths = sum(sum(parameter.shape) for parameter in parameters if parameter.ndim > 1)
    at_once = micro_batches(config, groups, accumulation) if plan.ranks > 1 else 1
    tokens = at_once * size * config.data.block_size
    each = 8 * widths + 4 * 64 * config.data.block_size
    return state + tokens * each * precision.parameters.itemsize <= free / 2


def _without(config: RunConfig, groups: ProcessGroups, problem: str) -> None:
    """Go on with the size that was asked for, unless a limit was asked for too."""
    limit, size = config.training.memory_limit, config.training.initial_batch_size
    if limit is not None:
        raise ArgonneError(
            f"memory_limit={limit:g} cannot be kept, as the memory of this model's step cannot be counted ({problem}); "
            "legal: leave it out, and say the micro-batch that fits: --initial-batch-size"
        )
    log(groups, f"note: whether micro-batch {size} fits into memory could not be found out ({problem})")


def _announcement(
    config: RunConfig, groups: ProcessGroups, initial: int, found: list[Rehearsed], room: Room | None
) -> str:
    training, size = config.training, config.training.initial_batch_size
    count, replicas = training.gradient_accumulation_steps, groups.data.size
    takes = ""
    if room is not None:
        most = room.own + max(each.needs for each in found)
        takes = f", in {most / GIB:.2f} of {room.limit / GIB:.2f} GiB a rank"
    return (
        f"micro-batch {size} of {initial} fits{takes}: the run's global batch is {size} x {count} micro-batches x "
        f"{replicas} replica{'s' if replicas > 1 else ''} = {size * count * replicas}"
    )


def _nothing_fits(
    config: RunConfig, groups: ProcessGroups, size: int, found: list[Rehearsed], rooms: list[Room | None]
) -> ArgonneError:
    rank = next(number for number, each in enumerate(found) if not each.fits)
    room, needs, training = rooms[rank], found[rank], config.training
    initial, reason = training.initial_batch_size, ""
    if room is not None:
        kind = "--memory-limit" if training.memory_limit is not None else "what is free"
        reason = (
            f": of {room.limit / GIB:.3g} GiB ({kind}) {1 - USABLE:.0%} are left for what is not counted, the process "
            f"has {room.own / GIB:.3g} itself, and tensors need {needs.needs / GIB:.3g}, weights and moments "
            f"{needs.state / GIB:.3g} of them"
        )
    tried = f"micro-batch {size}" if size == initial else f"no micro-batch from {initial} down to {size}"
    fits = "does not fit" if size == initial else "fits"
    return ArgonneError(
        f"{tried} of block_size={config.data.block_size} {fits} into the memory of rank {rank}{reason}; legal: "
        f"{what_helps(config, groups, size)}"
    )
