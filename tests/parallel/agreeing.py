"""What every test of the checking mode of ``record`` needs: blocks that may fail, and the one report of all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from argonne.parallel import CollectiveMismatch, Layout, ProcessGroups, record
from argonne.parallel.communication.collectives import all_reduce, gather_objects

WITHIN = 10.0  # seconds, from the beginning of the block to the report
TWO, FOUR = Layout(tensor=2), Layout(data=2, tensor=2)


def usable(groups: ProcessGroups) -> bool:
    """Whether the ranks are still in step: nothing that one of them has sent waits for another."""
    ranks = groups.world.size
    found = all_reduce(torch.tensor([float(groups.world.rank)]), groups.world)
    gathered = gather_objects(groups.tensor.rank, groups.tensor)
    return found.item() == ranks * (ranks - 1) / 2 and gathered == list(range(groups.tensor.size))


Report = tuple[str | None, float, bool]


def the_one_report(reports: list[Report]) -> str:
    messages = {message for message, *_ in reports}
    assert len(messages) == 1, f"the ranks' reports differ: {messages}"
    (message,) = messages
    assert message is not None, "no rank has noticed"
    assert "\n" not in message
    assert message.startswith("the ranks are out of step at collective ")
    for rank, (_, elapsed, is_usable) in enumerate(reports):
        assert elapsed < WITHIN, f"rank {rank} took {elapsed:.1f} s"
        assert is_usable, f"rank {rank} has been sent something"
    return message


def attempt(groups: ProcessGroups, act: Callable[[], Any], patience: float) -> Report:
    began, message = time.monotonic(), None
    try:
        with record(check=groups, patience=patience):
            act()
    except CollectiveMismatch as error:
        message = str(error)
    return message, time.monotonic() - began, usable(groups)
