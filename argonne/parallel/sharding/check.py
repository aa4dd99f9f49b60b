"""Declarations and gradients that cannot be: found by all ranks together, and said in one line.

A rank cannot see alone that two of them claim the same rows, or that their copies of a tensor differ. Here they tell
each other what they hold, once, and all come to the same verdict. What is sent is what the declarations say and a
number for each copy, never the tensors themselves.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from argonne.parallel.communication.collectives import gather_objects
from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.communication.isolation import is_isolated
from argonne.parallel.communication.layout import ranks_of
from argonne.parallel.errors import LayoutError
from argonne.parallel.sharding.coverage import Claim, Ranks, fault_of_tensor, indices, overlapping
from argonne.parallel.sharding.region import Region, holding_axes
from argonne.parallel.sharding.spec import ShardedParameter

SAMPLE = 1 << 11
"""Elements of a copy that are compared where it need not be all of them."""
TOLERANCE = 1e-3
"""How far two copies of a value may be apart, in units of the largest: not all kernels repeat their last bits."""

Key = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A tensor, where a box begins in it, and the box's shape."""


def check_declarations(
    parameters: Sequence[ShardedParameter], groups: ProcessGroups, values: bool | None = None
) -> None:
    """Require that what the ranks declare together is every whole tensor, once (collective over all ranks).

    Each element is in one region; its holders are the ranks that have it, and say the same of it; no region reaches
    beyond the whole tensor or the parameter. ``save_checkpoint``, ``data_parallel`` and the trainer ask this.

    Args:
        values: whether the copies of a region must have equal values; some elements of each are compared. None: of
            parameters without an initialiser only, as others may wait for ``initialise`` or a checkpoint.

    Raises:
        LayoutError: on every rank alike; the line names the tensor, the ranks and the indices.
    """
    own = [fault for sharded in parameters if (fault := _fault_of_parameter(sharded))]
    claims = [
        Claim((region.name,), (str(sharded.parameter.dtype),), region, sharded.is_declared)
        for sharded in parameters
        for region in sharded.spec.regions
    ]
    copies: dict[Key, Tensor] = {}
    if not own:
        for sharded in parameters:
            if values if values is not None else sharded.spec.initialiser is None:
                copies |= _copies(sharded, sharded.parameter.detach(), groups)
    partial = list(dict.fromkeys(claim.region.name for claim in claims if claim.region.partial_gradient))
    _check(claims, copies, groups, own, partial)


def check_pieces(pieces: Sequence[tuple[str, Region, Tensor]], groups: ProcessGroups) -> None:
    """As ``check_declarations``, for named parts of whole tensors that are to be saved.

    Of parts of one ``Region`` object (a weight, and its moments after it) only the first one's values are compared.
    """
    together: dict[int, list[tuple[str, Region, Tensor]]] = {}
    for piece in pieces:  # a weight and its moments have one region
        together.setdefault(id(piece[1]), []).append(piece)
    own = [
        f"{name!r}: rank {groups.world.rank} has {list(part.shape)} of it for {indices(region.start, region.shape)}; "
        "legal: a part of the region's shape"
        for name, region, part in pieces
        if tuple(part.shape) != region.shape
    ]
    claims = [
        Claim(tuple(name for name, *_ in those), tuple(str(part.dtype) for *_, part in those), those[0][1])
        for those in together.values()
    ]
    weights = [those[0] for those in together.values() if not own]
    copies = {(name, r.start, r.shape): part.detach() for name, r, part in weights if _has_copies(r, groups)}
    _check(claims, copies, groups, own, None)


def check_gradients(parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> None:
    """Require that complete gradients are equal, to the bit, on all ranks that hold a region (collective).

    For tests and debugging, after ``complete_gradients``: reads every gradient. A parameter whose gradient each rank
    has only in part, and that does not say so, is found here: a router before a ``copy_to_region`` that is missing.

    Raises:
        LayoutError: on every rank alike; the line names the tensor, the ranks, and how far they are apart.
    """
    copies: dict[Key, Tensor] = {}
    for sharded in parameters:
        gradient = sharded.parameter.grad
        if gradient is not None:
            copies |= _copies(sharded, gradient.detach(), groups)
        elif sharded.parameter.requires_grad:  # as the optimizer would see it: not there
            nothing = torch.full((), torch.nan).expand(sharded.parameter.shape)
            copies |= _copies(sharded, nothing, groups)
    told = gather_objects(_digests(copies, lambda part: part), groups.world)
    if faults := _differences(copies, told, groups, 0.0, whole=True):
        raise LayoutError(
            f"the gradient of {_and_more(faults)}; legal: equal on all holders: a declaration that says where the "
            "parameter is used, and copy_to_region where what is computed with it enters a parallel region"
        )


def _check(
    claims: Sequence[Claim],
    copies: Mapping[Key, Tensor],
    groups: ProcessGroups,
    own: Sequence[str],
    partial: list[str] | None,
) -> None:
    if is_isolated():  # nobody else says what they hold
        return
    place = tuple(axis.rank for axis in holding_axes(groups))
    mine = (list(own), place, list(claims), partial, _digests(copies, _sample))
    everyone = gather_objects(mine, groups.world)
    problems, places, held, partials, told = map(list, zip(*everyone, strict=True))
    faults = [fault for found in problems for fault in found]
    if not faults:
        ranks = Ranks(places)
        sound: set[tuple[object, ...]] = set()  # one block is as the next
        for together in _by_tensor(held):
            kind = tuple((rank, claim.kind) for rank, claim in together)
            if kind in sound:
                continue
            fault = fault_of_tensor(together, ranks)
            faults += [fault] if fault else []
            sound |= set() if fault else {kind}
    if not faults:
        faults = _faults_of_order(places, partials)
    if not faults:
        faults = [
            f"{fault}; legal: equal on all holders, or another declaration"
            for fault in _differences(copies, told, groups, TOLERANCE, whole=False)
        ]
    if faults:
        raise LayoutError(_and_more(faults))


def _and_more(faults: Sequence[str]) -> str:
    return faults[0] + (f" (and so {len(faults) - 1} more)" if len(faults) > 1 else "")


def _fault_of_parameter(sharded: ShardedParameter) -> str | None:
    """What one rank sees alone: a region beyond its parameter, or two in one place of it."""
    shape = tuple(sharded.parameter.shape)
    boxes = []
    for region in sharded.spec.regions:
        extents = region.shape[::-1] if region.transposed else region.shape
        if 0 in extents:  # another replica has all of its rows
            continue
        where = indices(region.local_start, extents)
        fits = len(region.local_start) == len(extents) == len(shape)
        if not fits or any(
            a < 0 or a + n > size for a, n, size in zip(region.local_start, extents, shape, strict=True)
        ):
            return f"{region.name!r} is to lie at {where} of {sharded.name} {list(shape)}; legal: within the parameter"
        boxes.append((region.local_start, extents))
    both = overlapping(boxes)
    if both is None:
        return None
    names = " and ".join(repr(sharded.spec.regions[number].name) for number in both)
    return f"{names} lie both at {indices(*boxes[both[1]])} of {sharded.name}; legal: regions that do not overlap"


def _by_tensor(held: Sequence[Sequence[Claim]]) -> Iterable[list[tuple[int, Claim]]]:
    """The claims of each whole tensor, with the rank that makes each; tensors that all ranks cut alike are one."""
    alike: dict[tuple[str, ...], list[tuple[int, Claim]]] = {}
    for rank, claims in enumerate(held):
        for claim in claims:
            alike.setdefault(claim.names, []).append((rank, claim))
    names = [name for together in alike for name in together]
    if len(names) == len(set(names)):
        return alike.values()
    single: dict[str, list[tuple[int, Claim]]] = {}
    for found in alike.values():  # one rank has moments of a tensor, say, and another has none
        for rank, claim in found:
            for name, dtype in zip(claim.names, claim.dtypes, strict=True):
                single.setdefault(name, []).append((rank, Claim((name,), (dtype,), claim.region, claim.is_declared)))
    return single.values()


def _faults_of_order(places: Sequence[tuple[int, ...]], partials: Sequence[list[str] | None]) -> list[str]:
    """Partial gradients travel in one buffer: the ranks of a stage must mean the same by it."""
    first: dict[int, int] = {}
    for rank, (place, names) in enumerate(zip(places, partials, strict=True)):
        other = first.setdefault(place[1], rank)
        if names != partials[other]:
            theirs, here = partials[other] or [], names or []
            odd = sorted(set(theirs) ^ set(here)) or theirs
            return [
                f"ranks {other} and {rank} differ in which tensors with a partial gradient they have part of, or in "
                f"their order: {', '.join(map(repr, odd[:4]))}; legal: some region of each on every rank, perhaps empty"
            ]
    return []


def _has_copies(region: Region, groups: ProcessGroups) -> bool:
    return 0 not in region.shape and any(len(region.holders_over(axis).ranks) > 1 for axis in holding_axes(groups))


def _copies(sharded: ShardedParameter, tensor: Tensor, groups: ProcessGroups) -> dict[Key, Tensor]:
    """The parts of ``tensor``, which belongs to a parameter, that other ranks have too."""
    regions = sharded.spec.regions
    held = [r for r in regions if _has_copies(r, groups) and not tensor.is_meta]
    return {(r.name, r.start, r.shape): r.part_of(tensor) for r in held}


def _sample(part: Tensor) -> Tensor:
    """Evenly spaced rows of a large tensor, and evenly spaced elements of them if they are too long."""
    for dim in range(part.ndim):
        step = -(-part.numel() // SAMPLE)
        part = part[(slice(None),) * dim + (slice(None, None, step),)]
    return part


def _digests(copies: Mapping[Key, Tensor], of: Callable[[Tensor], Tensor]) -> dict[Key, int]:
    """A number for each copy that is equal for equal bits: of what ``of`` takes of it."""
    found = {}
    for key, part in copies.items():
        elements = of(part).contiguous().flatten()  # a scalar has no bytes, nor has what is not contiguous
        found[key] = zlib.crc32(elements.view(torch.uint8).cpu().numpy().data)
    return found


def _differences(
    copies: Mapping[Key, Tensor],
    told: Sequence[Mapping[Key, int]],
    groups: ProcessGroups,
    tolerance: float,
    whole: bool,
) -> list[str]:
    """Copies that are further apart than ``tolerance`` times their largest element (collective if any differ)."""
    if all(numbers == told[0] for numbers in told):
        return []
    digests: dict[Key, dict[int, int]] = {}
    for rank, numbers in enumerate(told):
        for key, number in numbers.items():
            digests.setdefault(key, {})[rank] = number
    unequal = [key for key, numbers in digests.items() if len(set(numbers.values())) > 1]
    if not unequal:
        return []
    parts = {key: copies[key] if whole else _sample(copies[key]) for key in unequal if key in copies}
    everyone = gather_objects({key: part.double().cpu() for key, part in parts.items()}, groups.world)
    faults = []
    for key in unequal:
        first, *others = ((rank, held[key]) for rank, held in enumerate(everyone) if key in held)
        largest = max(float(first[1].abs().max()), 1e-300)
        apart = {rank: float((part - first[1]).abs().max()) for rank, part in others}
        far = {rank: distance for rank, distance in apart.items() if not distance <= tolerance * largest}
        if far:
            rank, distance = max(far.items(), key=lambda item: item[1])
            how = f"by up to {distance:.3g}" if math.isfinite(distance) else "as it is missing, or not finite, on one"
            faults.append(
                f"{key[0]!r} differs between {ranks_of([first[0], rank])} {how}, in the region from {list(key[1])} "
                f"whose largest element is {largest:.3g}"
            )
    return faults
