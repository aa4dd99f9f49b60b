"""Do the regions that all ranks claim make up whole tensors? Pure arithmetic on what they have told each other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice, product

import numpy as np

from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.layout import ranks_of
from argonne.parallel.sharding.region import Region

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Start and shape."""
Boxes = Sequence[tuple[int, Box]]
"""Boxes with the rank that has each."""
Coordinates = tuple[int, ...]
"""A rank's number along each axis on which regions have holders."""
AXES = ("tensor", "pipeline", "replicas")


@dataclass(frozen=True)
class Claim:
    """What one rank says of a region that it holds."""

    names: tuple[str, ...]
    """The tensors that are cut so: a weight, and with it its moments."""
    dtypes: tuple[str, ...]
    region: Region
    is_declared: bool = True

    @property
    def kind(self) -> tuple[object, ...]:
        """All that it says but for the names."""
        r = self.region
        return (r.whole_shape, r.start, r.shape, r.holders, r.partial_gradient, r.stages, r.replicas, self.dtypes)


class Ranks:
    """Where every rank of the job stands."""

    def __init__(self, places: Sequence[Coordinates]) -> None:
        self.places = places
        self._at = {place: rank for rank, place in enumerate(places)}
        self.sizes = [len({place[number] for place in places}) for number in range(len(AXES))]

    def holders(self, region: Region, rank: int) -> tuple[tuple[int, ...], ...]:
        """Along each axis those that hold ``region``, as ``rank`` declares it."""
        axes = [Axis(*axis) for axis in zip(AXES, self.sizes, self.places[rank], strict=True)]
        return tuple(region.holders_over(axis).ranks for axis in axes)

    def at(self, declared: tuple[tuple[int, ...], ...]) -> frozenset[int]:
        """The ranks that stand at those numbers along the axes."""
        return frozenset(self._at[place] for place in product(*declared) if place in self._at)


def fault_of_tensor(claims: Sequence[tuple[int, Claim]], ranks: Ranks) -> str | None:
    """Why the ``claims`` of one whole tensor, each by the rank of that number, cannot be; None if they can."""
    first = claims[0][1]
    name, whole = first.names[0], first.region.whole_shape
    for what in ("whole_shape", "dtype", "partial_gradient"):
        if any(_said(claim, what) != _said(first, what) for _, claim in claims):
            said: dict[object, list[int]] = {}
            for rank, claim in claims:
                said.setdefault(_said(claim, what), []).append(rank)
            told = ", ".join(f"{value} on {ranks_of(those)}" for value, those in said.items())
            return f"{what} of {name!r} is {told}; legal: the same on every rank"
    named = f"{name!r} {list(whole)}"
    boxes: dict[Box, dict[int, Claim]] = {}
    for rank, claim in claims:
        start, shape = claim.region.start, claim.region.shape
        fits = len(start) == len(shape) == len(whole)
        if not fits or any(a < 0 or n < 0 or a + n > size for a, n, size in zip(start, shape, whole, strict=True)):
            return f"{named}: rank {rank} claims {indices(start, shape)}; legal: indices within the whole tensor"
    claims, copies = _owned_and_copies(claims, ranks)
    for rank, claim in claims:
        if 0 not in claim.region.shape:
            boxes.setdefault((claim.region.start, claim.region.shape), {})[rank] = claim
    faults = [fault for box, held in boxes.items() if (fault := _fault_of_holders(box, held, ranks))][:1]
    faults += [fault for copy, owned in copies if not faults and (fault := _fault_of_copy(copy, owned))][:1]
    counts = _counts(boxes, whole)
    if counts is not None:
        doubled = next(_boxes_where(*counts, 2), None)
        if doubled is not None and not faults:
            those = [rank for box, held in boxes.items() if _overlap(box, doubled) for rank in held]
            faults.append(f"{ranks_of(those)} hold {indices(*doubled)} in regions that overlap")
        holes = [indices(*box) for box in islice(_boxes_where(*counts, 0), 2)]
        if holes:
            faults.append(f"nobody holds {' and '.join(holes)}")
    if not faults:
        return None
    legal = "each element in one region, and as its holders the ranks that have it"
    if not all(claim.is_declared for _, claim in claims):
        legal = "a declaration in shard_specs(), without which it counts as replicated"
    return f"{named}: {', and '.join(faults)}; legal: {legal}"


def _owned_and_copies(
    claims: Sequence[tuple[int, Claim]], ranks: Ranks
) -> tuple[Sequence[tuple[int, Claim]], list[tuple[Boxes, Boxes]]]:
    """The claims that must make up the tensor once, and each copy of a part of it beside its owner's.

    Where replicas share out the rows of a parameter that is held by several tensor-parallel ranks, each of these cuts
    rows of its own, as other things may lie before them in its parameter: their boxes agree in sum only.

    Say tensor ranks 0 and 1 both hold rows 0:4 of ``k_proj``, behind 4 rows of ``q_proj`` on rank 0 and 2 on rank 1,
    and 2 replicas share out these 8 and 6 rows. Of rank 0 the second replica has 0:4; of rank 1 the first has 0:1 and
    the second 1:4. Rank 0 is the owner: 0:4 must make up the tensor once (it is owned), and 0:1 with 1:4, a copy, must
    cover what 0:4 does.
    """
    if not any(claim.region.replicas and len(claim.region.holders) > 1 for _, claim in claims):
        return claims, []
    owned: list[tuple[int, Claim]] = []
    parts: dict[tuple[tuple[int, ...], int], list[tuple[int, Box]]] = {}
    for rank, claim in claims:
        region, place = claim.region, ranks.places[rank][0]
        if place in region.holders and 0 not in region.shape:
            parts.setdefault((region.holders, place), []).append((rank, (region.start, region.shape)))
        if place not in region.holders[1:]:
            alone = replace(region, holders=(place,)) if place in region.holders else region
            owned.append((rank, replace(claim, region=alone)))
    copies: list[tuple[Boxes, Boxes]] = [
        (boxes, parts.get((holders, holders[0]), [])) for (holders, at), boxes in parts.items() if at != holders[0]
    ]
    return owned, copies


def _fault_of_copy(copy: Boxes, owned: Boxes) -> str | None:
    """Whether the boxes of a copy cover what those of its owner cover."""
    mine, theirs = {box for _, box in copy}, {box for _, box in owned}
    if mine == theirs:
        return None
    edges = _edges(mine | theirs)
    if (_cells(mine, edges) == _cells(theirs, edges)).all():
        return None
    here, there = (ranks_of([rank for rank, _ in boxes]) for boxes in (copy, owned))
    return f"{here} and {there} are to hold the same and do not: {indices(*min(mine ^ theirs))} is on one side only"


def _said(claim: Claim, what: str) -> object:
    if what == "dtype":
        return ", ".join(dict.fromkeys(claim.dtypes))
    return claim.region.whole_shape if what == "whole_shape" else claim.region.partial_gradient


def _fault_of_holders(box: Box, held: Mapping[int, Claim], ranks: Ranks) -> str | None:
    """Whether those who claim a box are those whom each of them says that it has."""
    where = indices(*box)
    told: dict[frozenset[int], int] = {}
    for rank, claim in held.items():
        declared = ranks.holders(claim.region, rank)
        for axis, size, numbers, place in zip(AXES, ranks.sizes, declared, ranks.places[rank], strict=True):
            if place not in numbers:
                return f"rank {rank} has {where}, but as rank {place} of {axis} is not among its holders {numbers}"
            if not all(0 <= number < size for number in numbers):
                return f"{where} has the holders {numbers} over {axis}, which has {size} ranks"
        told[ranks.at(declared)] = rank
    wrong = [those for those in told if those != held.keys()]
    if not wrong:
        return None
    if len(told) > 1 and all(those < held.keys() for those in told):
        return f"{ranks_of([min(those) for those in told])} each claim {where} for their own"
    return f"{where} is on {ranks_of(held)}, but by its declaration on {ranks_of(wrong[0])}"


def _counts(boxes: Iterable[Box], whole: tuple[int, ...]) -> tuple[np.ndarray, list[list[int]]] | None:
    """How many boxes have each cell of the grid that all their edges make, and the edges; None if each has one."""
    boxes = list(boxes)
    if len(boxes) == 1 and boxes[0][1] == whole:
        return None
    edges = _edges([*boxes, ((0,) * len(whole), whole)])
    counts = _cells(boxes, edges)
    return None if (counts == 1).all() else (counts, edges)


def _edges(boxes: Collection[Box]) -> list[list[int]]:
    """Where boxes begin and end, along each dimension."""
    dims = range(len(next(iter(boxes))[0]))
    return [sorted({edge for start, shape in boxes for edge in (start[d], start[d] + shape[d])}) for d in dims]


def _cells(boxes: Iterable[Box], edges: list[list[int]]) -> np.ndarray:
    """How many of the boxes have each cell of the grid of the edges."""
    numbers = [{edge: number for number, edge in enumerate(cuts)} for cuts in edges]
    counts = np.zeros([len(cuts) - 1 for cuts in edges], dtype=np.int32)
    for start, shape in boxes:
        counts[tuple(slice(n[a], n[a + e]) for n, a, e in zip(numbers, start, shape, strict=True))] += 1
    return counts


def _boxes_where(counts: np.ndarray, edges: list[list[int]], least: int) -> Iterator[Box]:
    """Boxes of the cells that nobody has (``least`` 0), or that several have (2), each as large as its first allows."""
    wanted = counts == 0 if least == 0 else counts >= least
    while wanted.any():
        first = [int(n) for n in np.argwhere(wanted)[0]]
        last = [n + 1 for n in first]
        for dim in reversed(range(len(first))):
            while last[dim] < wanted.shape[dim]:
                grown = [slice(a, b + (d == dim)) for d, (a, b) in enumerate(zip(first, last, strict=True))]
                if not wanted[tuple(grown)].all():
                    break
                last[dim] += 1
        wanted[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] = False
        start = tuple(cuts[a] for cuts, a in zip(edges, first, strict=True))
        yield start, tuple(cuts[b] - a for cuts, b, a in zip(edges, last, start, strict=True))


def _overlap(one: Box, other: Box) -> bool:
    return all(a < b + m and b < a + n for a, n, b, m in zip(one[0], one[1], other[0], other[1], strict=True))


def overlapping(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """The numbers of two boxes that overlap, if any do."""
    pairs = combinations(range(len(boxes)), 2)
    return next(((one, other) for one, other in pairs if _overlap(boxes[one], boxes[other])), None)


def indices(start: Sequence[int], shape: Sequence[int]) -> str:
    """``[8:16, 0:4]``."""
    return "[" + ", ".join(f"{first}:{first + extent}" for first, extent in zip(start, shape, strict=False)) + "]"
