"""Which region of which whole tensor a parameter holds.

Each parallel layer declares this once for each of its parameters. Initialisation, the reduction of
gradients, the global gradient norm, checkpoints, resharding and export all follow from it; none of them
knows a parameter by its name, and nothing is stored on the tensors themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.errors import LayoutError
from argonne.parallel.sharding.initialisation import Initialiser


@dataclass(frozen=True)
class Region:
    """A box of one whole tensor: ``parameter[local_index] == whole[whole_index]``.

    Regions that two ranks hold of the same whole tensor are either identical or disjoint.
    """

    name: str
    """The whole tensor. A layer gives it relative to itself (``weight``, or ``../q_proj.weight`` for a
    tensor named after a sibling); ``sharded_parameters`` makes it absolute."""
    whole_shape: tuple[int, ...]
    start: tuple[int, ...]
    """The first index of the box in the whole tensor, for each dimension."""
    shape: tuple[int, ...]
    local_start: tuple[int, ...]
    """The first index of the box in the parameter; the rest of the parameter is padding, kept at zero."""
    holders: tuple[int, ...]
    """The tensor-parallel ranks with this same region; the first speaks for it."""
    partial_gradient: bool = False
    """Each holder has only a part of the gradient: the parts are summed over the holders. The same on every
    rank for all regions of a whole tensor, also for those with one holder."""
    stages: tuple[int, ...] = ()
    """The pipeline ranks that hold this same region (a tied embedding); empty: this one alone. Each has a part
    of the gradient."""
    replicas: tuple[int, ...] = ()
    """The ranks of ``groups.replicas`` that hold this same region (ZeRO and FSDP share out rows); empty: all of
    them."""

    def speaks(self, groups: ProcessGroups) -> bool:
        """Whether this rank counts the region in a norm and saves it: true on one rank of the job."""
        return (
            self.holders[0] == groups.tensor.rank
            and (not self.stages or self.stages[0] == groups.pipeline.rank)
            and self.speaks_for_replicas(groups)
        )

    def speaks_for_replicas(self, groups: ProcessGroups) -> bool:
        """Whether this rank is the first of the replicas that hold the region."""
        return groups.replicas.rank == (self.replicas[0] if self.replicas else 0)

    @property
    def whole_index(self) -> tuple[slice, ...]:
        return _box(self.start, self.shape)

    @property
    def local_index(self) -> tuple[slice, ...]:
        return _box(self.local_start, self.shape)


@dataclass(frozen=True)
class ShardSpec:
    """What one parameter holds, and how it begins."""

    regions: tuple[Region, ...]
    initialiser: Initialiser | None = None
    """``None``: the module has initialised the parameter itself."""


@runtime_checkable
class Sharded(Protocol):
    """A module that declares the ``ShardSpec`` of each parameter it owns itself."""

    def shard_specs(self) -> dict[str, ShardSpec]: ...


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter of a model together with its declaration; the region names are absolute."""

    name: str
    parameter: nn.Parameter
    spec: ShardSpec


def sharded_parameters(model: nn.Module, groups: ProcessGroups) -> list[ShardedParameter]:
    """Every distinct parameter of ``model`` with its spec, in module order.

    A parameter whose module declares nothing (``nn.LayerNorm``, say) counts as ``replicated``.

    Raises:
        LayoutError: a module declares a parameter that it does not have.
    """
    found: list[ShardedParameter] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        declared = module.shard_specs() if isinstance(module, Sharded) else {}
        own = dict(module.named_parameters(recurse=False))
        if unknown := sorted(declared.keys() - own.keys()):
            raise LayoutError(f"shard_specs of {prefix or 'the model'} names {unknown}; legal: {sorted(own)}")
        for name, parameter in own.items():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            spec = declared.get(name) or replicated(name, parameter.shape, groups)
            regions = tuple(replace(r, name=_absolute(prefix, r.name)) for r in spec.regions)
            qualified = f"{prefix}.{name}" if prefix else name
            found.append(ShardedParameter(qualified, parameter, replace(spec, regions=regions)))
    return found


def narrow_rows(
    sharded: ShardedParameter, rows: range, parameter: nn.Parameter, replicas: tuple[int, ...]
) -> ShardedParameter:
    """The declaration of ``parameter``, which is rows ``rows`` of ``sharded`` and held by ``replicas`` alone.

    It has a region, though perhaps without rows, for each that ``sharded`` has.
    """

    def narrowed(region: Region) -> Region:
        begin = region.local_start[0]
        first = min(max(rows.start, begin), begin + region.shape[0])
        last = max(first, min(rows.stop, begin + region.shape[0]))
        return replace(
            region,
            start=(region.start[0] + first - begin, *region.start[1:]),
            shape=(last - first, *region.shape[1:]),
            local_start=(max(0, first - rows.start), *region.local_start[1:]),
            replicas=replicas,
        )

    spec = replace(sharded.spec, regions=tuple(narrowed(region) for region in sharded.spec.regions))
    return ShardedParameter(sharded.name, parameter, spec)


def regions_of(parameters: Sequence[ShardedParameter]) -> Iterator[tuple[Region, Tensor]]:
    """Each region with the part of its parameter that holds it (a view)."""
    for sharded in parameters:
        for region in sharded.spec.regions:
            if 0 not in region.shape:
                yield region, sharded.parameter.data[region.local_index]


@torch.no_grad()
def initialise(parameters: Sequence[ShardedParameter], seed: int) -> None:
    """Fill each parameter with values that depend on the seed and the whole tensors' names only.

    Padding becomes zero; a parameter without an initialiser is left as its module made it.
    """
    for sharded in parameters:
        if sharded.spec.initialiser is None:
            continue
        sharded.parameter.zero_()
        for region, part in regions_of([sharded]):
            sharded.spec.initialiser.fill(part, seed, region.name, region.whole_shape, region.start)


def replicated(
    name: str,
    shape: Sequence[int],
    groups: ProcessGroups,
    initialiser: Initialiser | None = None,
    partial_gradient: bool | None = None,
) -> ShardSpec:
    """The spec of a parameter that every tensor-parallel rank holds whole.

    ``partial_gradient`` says whether each rank sees only a part of its uses, so that the gradients are summed:
    some of the heads (a norm of queries), or some of the tokens. Left out, it is taken to work between the
    tensor-parallel layers, where every rank sees all tokens, or its share under sequence parallelism.
    """
    shape = tuple(shape)
    start = (0,) * len(shape)
    partial = groups.sequence_parallel if partial_gradient is None else partial_gradient
    region = Region(name, shape, start, shape, start, tuple(range(groups.tensor.size)), partial)
    return ShardSpec((region,), initialiser)


def _box(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + extent) for first, extent in zip(start, shape, strict=True))


def _absolute(prefix: str, name: str) -> str:
    """``model.attn.qkv_proj`` + ``../q_proj.weight`` -> ``model.attn.q_proj.weight``."""
    climbs = name.count("../")
    path = prefix.split(".") if prefix else []
    return ".".join([*path[: len(path) - climbs], name.removeprefix("../" * climbs)])
