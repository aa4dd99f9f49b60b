"""What a search for a micro-batch comes to on the ranks of a layout, some of which are made to run out of memory."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from argonne.models import Batch, CrossEntropyLoss
from argonne.models.decoder import Block
from argonne.parallel import ProcessGroups
from argonne.training.config import RunConfig
from argonne.training.machine import GIB
from argonne.training.run import search as room
from argonne.training.run.memory import USABLE
from argonne.training.run.rehearsal import Rehearsed, rehearse
from argonne.training.run.setup import Workload, prepare
from argonne.training.state import TrainingState
from argonne.training.step import train_step

LARGEST = 4
"""Sequences of the largest micro-batch that fits."""
SCALARS = 64
"""Bytes of numbers that live longer in one of two ways to count."""


@dataclass(frozen=True)
class Failure:
    """Where a step of more than ``LARGEST`` sequences runs out of memory, and on which ranks."""

    where: Literal["forward", "backward", "update", "limit"]
    ranks: tuple[int, ...] = (0, 1)

    def __str__(self) -> str:
        return f"{self.where} on {'all' if len(self.ranks) > 1 else f'rank {self.ranks[0]}'}"


def searched(groups: ProcessGroups, config: RunConfig, failure: Failure) -> tuple[int, list[float], bool]:
    """The micro-batch that is found, the losses that follow, and whether the random streams are as they were."""
    workload = prepare(config, groups)
    if failure.where == "limit":  # half-way between what is needed here and for twice as many sequences
        rehearsed = [rehearse(config, workload, groups, size, math.inf) for size in (LARGEST, 2 * LARGEST)]
        require_alike(rehearse(config, workload, groups, LARGEST, math.inf, computes=True), rehearsed[0])
        limit = sum(each.needs for each in rehearsed) / 2 / USABLE / GIB
        config = replace(config, training=replace(config.training, memory_limit=limit))
    failing = injected(failure, groups.world.rank, config.data.block_size)
    before = random_state()
    with failing, mock.patch.object(room, "surely_fits", return_value=False), mock.patch.object(room, "resident_bytes"):
        room.resident_bytes.return_value = 0  # type: ignore[attr-defined]
        config, workload, found = room.search(config, workload, groups, computes=failure.where != "limit")
    size, is_untouched = config.training.initial_batch_size, random_state() == before
    assert found is not None
    assert found.micro_batch == size
    return size, losses(groups, config, workload), is_untouched


def require_alike(computed: Rehearsed, followed: Rehearsed) -> None:
    """What a step is counted to need with numbers and without is the same but for a few of these themselves."""
    assert computed.fits
    assert computed.state == followed.state
    assert abs(computed.needs - followed.needs) <= SCALARS


def undisturbed(groups: ProcessGroups, config: RunConfig) -> list[float]:
    """The losses of a run that is started with the size of ``config``."""
    return losses(groups, config, prepare(config, groups))


def losses(groups: ProcessGroups, config: RunConfig, workload: Workload) -> list[float]:
    """Of three steps on one batch."""
    state = TrainingState.build(config, workload, groups)
    state.initialise(config.training.seed)
    shape = (
        config.training.gradient_accumulation_steps,
        config.training.initial_batch_size,
        config.data.block_size + 1,
    )
    tokens = torch.randint(300, shape, generator=torch.Generator().manual_seed(groups.data.rank))
    batch = Batch(tokens[..., :-1], tokens[..., 1:], divisor=float(tokens[..., 1:].numel() * groups.data.size))
    return [train_step(state, batch, CrossEntropyLoss(), 0.01, 1.0).loss for _ in range(3)]


def random_state() -> tuple[list[int], Any]:
    """Of PyTorch's generator and Python's."""
    return torch.get_rng_state().tolist(), random.getstate()


@contextlib.contextmanager
def injected(failure: Failure, rank: int, block_size: int) -> Iterator[None]:
    """Within, a step of too many sequences fails on this rank, if it is one of those."""
    if rank not in failure.ranks or failure.where == "limit":
        yield
        return
    rows, update = [0], torch.optim.AdamW.step

    def fail(*_: Any) -> None:
        if rows[0] > LARGEST * block_size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(module, Block):
            rows[0] = len(inputs[0])
            if failure.where == "forward":
                fail()
            if failure.where == "backward" and output.requires_grad:
                output.register_hook(fail)

    def step(*arguments: Any, **options: Any) -> Any:
        if failure.where == "update":
            fail()
        return update(*arguments, **options)

    hook = nn.modules.module.register_module_forward_hook(after)
    try:
        with mock.patch.object(torch.optim.AdamW, "step", step):
            yield
    finally:
        hook.remove()
