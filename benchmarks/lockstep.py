"""Every rank of a job in one process, one after the other: what a layout computes on a machine with one device.

A program is run for each rank again and again, each time one collective further: what ranks handed to the collectives
so far is known from the runs before, and what follows the first that is not known counts for nothing. So the program
must do the same each time. The layers, the products and the sums are those of training; only the messages are not sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.communication.tree import tree_sum

T = TypeVar("T")
_AXES = ("world", "tensor", "stage", "model")  # of a layout that is tensor-parallel only, one and the same


class _Done:
    """A collective that is over when it has begun."""

    def wait(self, timeout: Any = None) -> bool:
        return True


class _Ranks:
    """What the ranks have handed to each collective, in the order of the program."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.known: list[tuple[str, list[Tensor]]] = []
        """Of the collectives that all ranks have reached."""
        self.next: dict[int, tuple[str, Tensor]] = {}
        """Of the one after these."""

    def settle(self) -> bool:
        """Whether the ranks reached one more collective."""
        if not self.next:
            return False
        found = [self.next[rank] for rank in range(self.size)]
        (kind,) = {kind for kind, _ in found}
        self.known.append((kind, [tensor for _, tensor in found]))
        self.next = {}
        return True


class _Group(dist.ProcessGroup):
    """A process group whose other members have been here before."""

    def __init__(self, rank: int, ranks: _Ranks) -> None:
        super().__init__(rank, ranks.size)
        self._rank, self._ranks, self._count = rank, ranks, 0
        self._receivers: list[tuple[int, Tensor]] = []

    def restart(self) -> None:
        self._count = 0

    def _meet(self, kind: str, tensor: Tensor) -> list[Tensor] | None:
        """What all ranks hand in; None where that is not known yet."""
        number = self._count
        self._count += 1
        if number < len(self._ranks.known):
            expected, tensors = self._ranks.known[number]
            assert kind == expected, f"collective {number} is {kind}, and was {expected}"
            return tensors
        if number == len(self._ranks.known):
            self._ranks.next[self._rank] = (kind, tensor.clone())
        return None

    def allreduce(self, tensors: Sequence[Tensor], options: Any = None) -> _Done:
        (tensor,) = tensors
        if found := self._meet("all_reduce", tensor):
            tensor.copy_(tree_sum([each.clone() for each in found]))
        return _Done()

    def all_gather_single(self, output: Tensor, tensor: Tensor, options: Any = None) -> _Done:
        if found := self._meet("all_gather", tensor):
            output.copy_(torch.cat([each.flatten() for each in found]).view_as(output))
        return _Done()

    def all_to_all_single(self, output: Tensor, tensor: Tensor, *options: Any) -> _Done:
        if found := self._meet("all_to_all", tensor):
            parts = [each.view(self._ranks.size, -1)[self._rank] for each in found]
            output.copy_(torch.cat(parts).view_as(output))
        return _Done()

    def send(self, tensors: Sequence[Tensor], target: int, tag: int) -> _Done:
        """Of an all-gather of messages (``collectives._Sends``), the same to every rank: the first tells of it."""
        if target == (self._rank + 1) % self._ranks.size:
            (tensor,) = tensors
            if found := self._meet("sends", tensor):
                for source, receiver in self._receivers:
                    receiver.copy_(found[source].view_as(receiver))
            self._receivers.clear()
        return _Done()

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int) -> _Done:
        self._receivers.append((source, tensors[0]))
        return _Done()

    # The names before torch 2.13.
    _allgather_base = all_gather_single
    alltoall_base = all_to_all_single


def in_lockstep(
    layout: Layout, device: torch.device, build: Callable[[ProcessGroups], Callable[[], T]]
) -> tuple[list[T], list[T], int]:
    """What every rank of a tensor-parallel ``layout`` returns, and again, and how many collectives each took part in.

    Args:
        layout: of tensor parallelism only.
        device: of all ranks.
        build: makes a rank's program from its groups, once; the program does the same whenever it is called.
    """
    assert layout == Layout(tensor=layout.tensor), "other axes meet in other collectives"
    ranks = _Ranks(layout.tensor)
    members, programs = [], []
    for rank in range(layout.tensor):
        groups, member = ProcessGroups.of_rank(layout, rank, device), _Group(rank, ranks)
        if layout.tensor > 1:
            everyone = tuple(range(layout.tensor))
            axes = {name: replace(getattr(groups, name), group=member, ranks=everyone) for name in _AXES}
            groups = replace(groups, **axes)
        members.append(member)
        programs.append(build(groups))

    def turn() -> list[T]:
        results = []
        for member, program in zip(members, programs, strict=True):
            member.restart()
            results.append(program())
        return results

    while True:
        results = turn()
        if not ranks.settle():
            return results, turn(), len(ranks.known)
