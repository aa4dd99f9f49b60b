"""A fault planted in a training step is reported by every rank in one line; without one, nothing changes."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from argonne.models import ArgonneConfig, ArgonneModel, Execution
from argonne.parallel import (
    Axis,
    Collective,
    CollectiveMismatch,
    Layout,
    ProcessGroups,
    complete_gradients,
    global_gradient_norm,
    record,
)
from argonne.parallel.communication import collectives
from argonne.parallel.communication.collectives import Pending, all_reduce, barrier, start_all_reduce
from tests.losses import summed_loss
from tests.parallel.agreeing import FOUR, TWO, Report, the_one_report, usable
from tests.pool import RankPool

CONFIG = ArgonneConfig(
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=30,
    intermediate_size=16,
    max_position_embeddings=16,
)


class Step:
    """A training step of a small model."""

    def __init__(self, groups: ProcessGroups) -> None:
        self.groups = groups
        self.model = ArgonneModel(CONFIG, Execution(groups))
        self.model.initialise(seed=1)
        self.parameters = self.model.sharded_parameters()
        generator = torch.Generator().manual_seed(groups.data.rank)
        self.ids = torch.randint(0, CONFIG.vocab_size, (2, 6), generator=generator)

    def __call__(self) -> list[Tensor]:
        """The loss, the norm, its sum over the tensor group (the last call of the block) and every gradient."""
        loss = summed_loss(self.model, self.ids, self.ids.flip(0))
        loss.backward()
        complete_gradients(self.parameters, self.groups)
        norm = global_gradient_norm(self.parameters, self.groups)
        gradients = [sharded.parameter.grad for sharded in self.parameters if sharded.parameter.grad is not None]
        return [loss.detach(), norm, all_reduce(norm.clone(), self.groups.tensor), *gradients]


@contextmanager
def planted(fault: str, groups: ProcessGroups, at: int, faulty: bool) -> Iterator[None]:
    """All-reduce ``at`` of the block goes wrong on the faulty rank."""
    count = itertools.count()
    real = start_all_reduce

    def start(tensor: Tensor, axis: Axis, site: str | None = None, *, wait: bool = False) -> Pending:
        if axis.group is None or next(count) != at:
            return real(tensor, axis, site, wait=wait)
        if fault == "swapped order":  # with a barrier
            if faulty:
                barrier(groups.world)
            pending = real(tensor, axis, site, wait=wait)
            if not faulty:
                barrier(groups.world)
            return pending
        if faulty:
            if fault == "missing call":
                return Pending(tensor)
            if fault == "wrong shape":
                tensor = torch.cat([tensor.flatten(), tensor.flatten()])
            elif fault == "wrong dtype":
                tensor = tensor.half()
            elif fault == "wrong group":
                axis = groups.data if groups.data.size > 1 else groups.world
        return real(tensor, axis, site, wait=wait)

    with mock.patch.object(collectives, "start_all_reduce", start):
        yield


def clean_step(groups: ProcessGroups) -> list[Collective]:
    """The log of a step that is checked: its gradients are then compared too, by one collective more."""
    step = Step(groups)
    with record(step.model, check=groups) as log:
        step()
    return log.collectives


def faulty_step(groups: ProcessGroups, fault: str, at: int, faulty_rank: int) -> Report:
    """What is raised, after how long, and whether the ranks are usable."""
    step = Step(groups)
    began, message = time.monotonic(), None
    with planted(fault, groups, at, groups.world.rank == faulty_rank):
        try:
            with record(step.model, check=groups):
                step()
        except CollectiveMismatch as error:
            message = str(error)
    elapsed = time.monotonic() - began
    return message, elapsed, usable(groups)


FAULTS = ["missing call", "swapped order", "wrong shape", "wrong dtype", "wrong group"]
PLACES = ["forward of a block", "backward of a block", "last call"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported_by_both_ranks_in_the_same_line_and_nothing_is_sent(
    ranks: RankPool, fault: str, faulty: int, place: str
) -> None:
    log = ranks.run(TWO, clean_step)[faulty]
    at, due = find(log, place)
    reduced = [c for c in log if c.op == "all_reduce"]
    instead = {
        "missing call": str(reduced[at + 1]) if at + 1 < len(reduced) else "the end of the block",
        "swapped order": "barrier over world (ranks 0, 1) (outside)",
        "wrong shape": str(replace(due, shape=(2 * torch.Size(due.shape).numel(),))),
        "wrong dtype": str(replace(due, dtype=torch.float16)),
        "wrong group": str(replace(due, axis="world")),
    }[fault]
    if fault == "swapped order" and due.phase == "forward":
        instead = f"barrier over world (ranks 0, 1) at {due.module} (forward)"
    message = the_one_report(ranks.run(TWO, faulty_step, fault, at, faulty))
    said = [f"rank {rank}: {instead if rank == faulty else due}" for rank in (0, 1)]
    assert message == f"the ranks are out of step at collective {log.index(due) + 1} of ranks 0, 1: {'; '.join(said)}"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("faulty", range(4))
@pytest.mark.parametrize("fault", ["missing call", "wrong group"])
def test_a_planted_fault_in_one_group_is_reported_by_the_ranks_of_all_groups(
    ranks: RankPool, fault: str, faulty: int, place: str
) -> None:
    at, due = find(ranks.run(FOUR, clean_step)[faulty], place)
    message = the_one_report(ranks.run(FOUR, faulty_step, fault, at, faulty))
    # What another rank waits for in vain, or (if ranks meet that should not) what has been called in its place.
    over_data = str(replace(due, axis="data", ranks=(faulty % 2, faulty % 2 + 2)))
    assert str(due) in message or (fault == "wrong group" and over_data in message)
    if fault == "missing call" and place == "last call":
        assert f": rank {faulty} will not come: " in message
        assert re.search(rf"ranks? [\d, ]*{faulty}[\d, ]*: the end of the block", message)


def find(log: list[Collective], place: str) -> tuple[int, Collective]:
    """The number among all all-reduces of the one at ``place``, and itself, which is what its report must say."""
    reduced = [c for c in log if c.op == "all_reduce"]
    if place == "last call":
        at, text = len(reduced) - 1, "all_reduce [] float64 over tensor (ranks {}) (outside)"
    else:
        phase, layer = place.split()[0], {"forward": "self_attn.o_proj", "backward": "mlp.gate_up_proj"}
        module = f"model.layers.1.{layer[phase]}"
        (at,) = (i for i, c in enumerate(reduced) if c.module == module)
        text = f"all_reduce [12, 8] float32 over tensor (ranks {{}}) at {module} ({phase})"
    assert str(reduced[at]) == text.format(", ".join(map(str, reduced[at].ranks)))
    return at, reduced[at]


def compared(groups: ProcessGroups) -> tuple[bool, bool, bool]:
    free, checked = Step(groups), Step(groups)
    with record(free.model) as plain:
        expected = free()
    with record(checked.model, check=groups) as log:
        found = checked()

    def timeless(entries: list[Collective]) -> list[Collective]:
        # Checking compares the gradients too, which free running does not.
        entries = [entry for entry in entries if entry.op != "gather_objects"]
        return [replace(entry, started=0.0, finished=0.0) for entry in entries]

    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    ordered = all(entry.started <= entry.finished < float("inf") for entry in log.collectives)
    return same, timeless(log.collectives) == timeless(plain.collectives), ordered


@pytest.mark.parametrize("layout", [TWO, replace(TWO, sequence_parallel=True), FOUR, Layout(tensor=4)])
def test_ranks_in_step_get_the_same_bits_and_the_same_log_as_without_checking(ranks: RankPool, layout: Layout) -> None:
    assert ranks.run(layout, compared) == [(True, True, True)] * layout.world_size
