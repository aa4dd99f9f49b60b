"""Whole tensors of which each rank has parts: each is put together on one rank, its owner, and handed out again.

For what cannot be done part by part: an optimizer that orthogonalises, say. Owners are chosen by what their tensors
cost. Many tensors go in rounds, so that one is on its way while another is computed; a round is two all-to-alls over
the ranks of a pipeline stage, which all of them issue in one order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from argonne.parallel.communication.collectives import Pending, gather_objects, start_uneven_all_to_all
from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.sharding.coverage import Box
from argonne.parallel.sharding.region import Region
from argonne.parallel.sharding.spec import ShardedParameter

ROUND_ELEMENTS = 1 << 24
"""Of the whole tensors of one owner in one round, or one tensor: what bounds the memory that they take."""


@dataclass(frozen=True)
class Claim:
    """What a rank tells the others of a region that it has."""

    name: str
    whole_shape: tuple[int, ...]
    box: Box
    replica: int
    """Its number along ``groups.replicas``."""
    counts: bool
    """Whether the boxes of this place on the tensor axis are those that make up the tensor once."""


@dataclass(frozen=True)
class Whole:
    """A whole tensor, who puts it together, and who sends and receives which of its boxes."""

    name: str
    shape: tuple[int, ...]
    owner: int
    sources: tuple[tuple[int, Box], ...]
    """A rank for each box; the boxes are the tensor."""
    holders: tuple[tuple[int, Box], ...]
    """Every rank with each box that it has."""


@dataclass(frozen=True)
class LocalPart:
    """A region of one of this rank's parameters."""

    sharded: ShardedParameter
    region: Region

    def of(self, tensor: Tensor) -> Tensor:
        """It, in the parameter or what has its shape (a view with the whole tensor's dimensions)."""
        return self.region.part_of(tensor)


Cost = Callable[[tuple[int, ...]], float]


def plan_wholes(claims: Sequence[Sequence[Claim]], cost: Cost) -> list[Whole]:
    """Every whole tensor that ranks claim parts of, each with an owner; ``claims`` are those of each rank.

    The dearest first, each to the rank with the least to do so far of those that have a part of it (greedy, at most
    4/3 of the best). An owner is sent each box by the holder that is nearest to it: by itself, if it has the box.
    """
    found: dict[str, list[tuple[int, Claim]]] = {}
    for rank, own in enumerate(claims):
        for claim in own:
            found.setdefault(claim.name, []).append((rank, claim))
    load = [0.0] * len(claims)
    replica = [own[0].replica if own else 0 for own in claims]
    wholes = []
    for name in sorted(found, key=lambda name: (-cost(found[name][0][1].whole_shape), name)):
        held, shape = found[name], found[name][0][1].whole_shape
        owner = min((rank for rank, _ in held), key=lambda rank: (load[rank], rank))
        load[owner] += cost(shape)

        def distance(rank: int, owner: int = owner) -> tuple[int, int]:
            return abs(replica[rank] - replica[owner]), abs(rank - owner)

        sources = tuple(
            (min((rank for rank, claim in held if claim.box == box), key=distance), box)
            for box in dict.fromkeys(claim.box for _, claim in held if claim.counts)
        )
        wholes.append(Whole(name, shape, owner, sources, tuple((rank, claim.box) for rank, claim in held)))
    return wholes


def in_rounds(wholes: Sequence[Whole], elements: int) -> list[list[Whole]]:
    """Rounds in which each owner has so many elements to put together, or one tensor; its dearest come first."""
    rounds: list[list[Whole]] = []
    at: dict[int, tuple[int, int]] = {}  # of each owner, the round that it fills, and how far it is filled
    for whole in wholes:
        number, filled = at.get(whole.owner, (0, 0))
        size = math.prod(whole.shape)
        if filled and filled + size > elements:
            number, filled = number + 1, 0
        at[whole.owner] = number, filled + size
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(whole)
    return rounds


class WholeTensors:
    """The whole tensors that ``parameters`` are parts of (collective over a stage, as is every call).

    Args:
        parameters: on all ranks of a stage together, every part of each tensor.
        cost: what a whole tensor of a shape takes its owner.
        dtype: in which parts are sent, and whole tensors made.
        elements: of one owner's tensors in a round.
    """

    def __init__(
        self,
        parameters: Sequence[ShardedParameter],
        groups: ProcessGroups,
        cost: Cost,
        dtype: torch.dtype,
        elements: int = ROUND_ELEMENTS,
    ) -> None:
        self.axis, self.device, self.dtype = groups.stage, groups.device, dtype
        regions = [(s, region) for s in parameters for region in s.spec.regions if 0 not in region.shape]
        self._parts = {(r.name, (r.start, r.shape)): LocalPart(s, r) for s, r in regions}
        own = [
            Claim(r.name, r.whole_shape, (r.start, r.shape), groups.replicas.rank, r.is_owner_over(groups.tensor))
            for _, r in regions
        ]
        self.wholes = plan_wholes(gather_objects(own, self.axis), cost)
        self.rounds = in_rounds(self.wholes, elements)

    def map(
        self,
        take: Callable[[LocalPart], Tensor],
        compute: Callable[[Tensor], Tensor],
        give: Callable[[LocalPart, Tensor], None],
        beside: Callable[[], object] = lambda: None,
    ) -> None:
        """Hand ``give`` the parts of what ``compute`` makes of each whole tensor that the parts of ``take`` make.

        ``take`` and ``give`` are called once for each part of this rank, ``compute`` on the owners alone. A round is
        gathered while the one before it is computed, and handed out while the next one is; ``beside`` is called while
        the first is gathered.
        """
        gathering = self._gather(0, take) if self.rounds else None
        beside()
        returning: Callable[[], None] | None = None
        for number in range(len(self.rounds)):
            assert gathering is not None
            current, gathering = gathering, self._gather(number + 1, take) if number + 1 < len(self.rounds) else None
            made = {name: compute(whole) for name, whole in self._put_together(number, current)}
            started = self._hand_out(number, made, give)
            if returning is not None:
                returning()
            returning = started
        if returning is not None:
            returning()

    def _gather(self, number: int, take: Callable[[LocalPart], Tensor]) -> Pending:
        parts = {}
        for whole in self.rounds[number]:
            for rank, box in whole.holders:
                if rank == self.axis.rank:
                    parts[whole.name, box] = take(self._parts[whole.name, box])
        sends = [(w.owner, parts[w.name, box]) for w, rank, box in self._sources(number) if rank == self.axis.rank]
        receives = [(rank, box) for w, rank, box in self._sources(number) if w.owner == self.axis.rank]
        return self._start(sends, receives)

    def _put_together(self, number: int, pending: Pending) -> Iterator[tuple[str, Tensor]]:
        own = [whole for whole in self.rounds[number] if whole.owner == self.axis.rank]
        received = self._received(pending, [(w.name, rank, box) for w in own for rank, box in w.sources])
        for whole in own:
            tensor = torch.empty(whole.shape, dtype=self.dtype, device=self.device)
            for (_, box), part in zip(whole.sources, received.pop(whole.name), strict=True):
                tensor[_index(box)] = part
            yield whole.name, tensor

    def _hand_out(
        self, number: int, made: dict[str, Tensor], give: Callable[[LocalPart, Tensor], None]
    ) -> Callable[[], None]:
        """Begin to; what is returned waits for it, and gives."""
        sends = []
        mine: list[tuple[str, int, Box]] = []
        for whole in self.rounds[number]:
            for rank, box in whole.holders:
                if whole.owner == self.axis.rank:
                    sends.append((rank, made[whole.name][_index(box)]))
                if rank == self.axis.rank:
                    mine.append((whole.name, whole.owner, box))
        pending = self._start(sends, [(owner, box) for _, owner, box in mine])

        def finish() -> None:
            received = self._received(pending, mine)
            for name, _, box in mine:
                give(self._parts[name, box], received[name].pop(0))

        return finish

    def _sources(self, number: int) -> Iterator[tuple[Whole, int, Box]]:
        for whole in self.rounds[number]:
            for rank, box in whole.sources:
                yield whole, rank, box

    def _start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Box]]) -> Pending:
        """Send each tensor to its rank, and make room for the boxes that ranks send; those of a pair in one order."""
        flat = [tensor.reshape(-1) for _, tensor in sorted(sends, key=lambda send: send[0])]  # stable
        sent = torch.cat(flat) if flat else torch.empty(0, dtype=self.dtype, device=self.device)
        lengths, sizes = [0] * self.axis.size, [0] * self.axis.size
        for rank, tensor in sends:
            lengths[rank] += tensor.numel()
        for rank, (_, shape) in receives:
            sizes[rank] += math.prod(shape)
        return start_uneven_all_to_all(sent, lengths, sizes, self.axis)

    def _received(self, pending: Pending, boxes: Sequence[tuple[str, int, Box]]) -> dict[str, list[Tensor]]:
        """Of each tensor the parts that came, in the order of ``boxes``, each with its name and the rank it is from."""
        by_rank = sorted(range(len(boxes)), key=lambda number: boxes[number][1])  # stable: within a rank as sent
        sizes = [math.prod(boxes[number][2][1]) for number in by_rank]
        parts = dict(zip(by_rank, pending.wait().split(sizes), strict=True))
        found: dict[str, list[Tensor]] = {}
        for number, (name, _, (_, shape)) in enumerate(boxes):
            found.setdefault(name, []).append(parts[number].view(shape))
        return found


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(first, first + extent) for first, extent in zip(*box, strict=True))
