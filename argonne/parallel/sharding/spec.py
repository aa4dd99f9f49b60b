"""What each parameter of a model holds.

Each parallel layer declares this once for each of its parameters. Initialisation, the reduction of
gradients, the global gradient norm, checkpoints, resharding and export all follow from it; none of them
knows a parameter by its name, and nothing is stored on the tensors themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.errors import LayoutError
from argonne.parallel.sharding.declare import replicated
from argonne.parallel.sharding.region import Region, ShardSpec
from argonne.parallel.sharding.uses import UsedApart


@runtime_checkable
class Sharded(Protocol):
    """A module that declares the ``ShardSpec`` of its parameters.

    The keys are names of its own parameters, or of its children's (``w1.weight``), where it knows better than they.
    The names of the regions are relative to the module that declares them.
    """

    def shard_specs(self) -> dict[str, ShardSpec]: ...


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter of a model together with its declaration; the region names are absolute."""

    name: str
    parameter: nn.Parameter
    spec: ShardSpec
    is_declared: bool = True
    """Whether a module says so; otherwise it is taken to be ``replicated``."""
    aliases: tuple[nn.Parameter, ...] = ()
    """Parameters of the same memory, by which other uses of the weight have sums of their own for their gradients."""
    is_block_matrix: bool = False
    """Whether its whole tensors are matrices of a model's blocks, which Muon may orthogonalise."""

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """The parameter and its aliases, if it is trained."""
        return (self.parameter, *self.aliases) if self.parameter.requires_grad else ()


def sharded_parameters(model: nn.Module, groups: ProcessGroups) -> list[ShardedParameter]:
    """Every distinct parameter of ``model`` with its spec, in module order.

    A parameter that no module declares (of ``nn.LayerNorm``, say) counts as ``replicated``. Under sequence parallelism
    only norms and what is not trained may go undeclared: a norm is used between the tensor-parallel layers, and of
    everything else the gradient depends on where it is used. Of several declarations of one parameter that of the
    outermost module counts.

    Raises:
        LayoutError: a module declares a parameter that it does not have, or does not declare one that it must.
    """
    declared: dict[int, ShardSpec] = {}
    for prefix, module in model.named_modules():
        specs: dict[str, ShardSpec] = module.shard_specs() if isinstance(module, Sharded) else {}
        below = dict(module.named_parameters(remove_duplicate=False)) if specs else {}
        if unknown := sorted(specs.keys() - below.keys()):
            dotted = any("." in name for name in unknown)
            legal = sorted(name for name in below if dotted or "." not in name)
            raise LayoutError(f"shard_specs of {prefix or 'the model'} names {unknown}; legal: {legal}")
        for name, spec in specs.items():
            regions = tuple(replace(r, name=_absolute(prefix, r.name)) for r in spec.regions)
            declared.setdefault(id(below[name]), replace(spec, regions=regions))
    found: list[ShardedParameter] = []
    unknown_use: list[str] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            qualified = f"{prefix}.{name}" if prefix else name
            own = declared.get(id(parameter))
            if own is None:
                if groups.sequence_parallel and parameter.requires_grad and not _is_norm(module):
                    unknown_use.append(f"{qualified} of {type(module).__name__}")
                everywhere = replicated(qualified, parameter.shape, groups, used="between")
                own = replace(everywhere, is_table=isinstance(module, nn.Embedding | nn.EmbeddingBag))
            uses = module.uses_apart().get(name) if isinstance(module, UsedApart) else None
            aliases = () if uses is None else uses.aliases(parameter)
            found.append(ShardedParameter(qualified, parameter, own, id(parameter) in declared, aliases))
    if unknown_use:
        rest = f" and {len(unknown_use) - 4} more" if len(unknown_use) > 4 else ""
        raise LayoutError(
            f"no shard_specs() declares {', '.join(unknown_use[:4])}{rest}, whose gradient depends under sequence "
            "parallelism on where it is used; legal: replicated(..., used='between', 'inside' or 'outside') in "
            "shard_specs() of the module or of one that contains it"
        )
    return found


def with_block_matrices(parameters: Sequence[ShardedParameter], blocks: Iterable[nn.Module]) -> list[ShardedParameter]:
    """``parameters``, those marked whose whole tensors are matrices, and no tables, of some module of ``blocks``."""
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}

    def is_one(sharded: ShardedParameter) -> bool:
        spec = sharded.spec
        two = all(len(region.whole_shape) == 2 for region in spec.regions)
        return id(sharded.parameter) in inside and two and not spec.is_table

    return [replace(sharded, is_block_matrix=is_one(sharded)) for sharded in parameters]


def narrow_rows(
    sharded: ShardedParameter, rows: range, parameter: nn.Parameter, replicas: tuple[int, ...]
) -> ShardedParameter:
    """The declaration of ``parameter``, which is rows ``rows`` of ``sharded`` and held by ``replicas`` alone.

    It has a region, though perhaps without rows, for each that ``sharded`` has.
    """

    def narrowed(region: Region) -> Region:
        dim = len(region.shape) - 1 if region.transposed else 0  # that of the whole tensor which the rows are
        begin, extent = region.local_start[0], region.shape[dim]
        first = min(max(rows.start, begin), begin + extent)
        last = max(first, min(rows.stop, begin + extent))
        return replace(
            region,
            start=(*region.start[:dim], region.start[dim] + first - begin, *region.start[dim + 1 :]),
            shape=(*region.shape[:dim], last - first, *region.shape[dim + 1 :]),
            local_start=(max(0, first - rows.start), *region.local_start[1:]),
            replicas=replicas,
        )

    spec = replace(sharded.spec, regions=tuple(narrowed(region) for region in sharded.spec.regions))
    return replace(sharded, parameter=parameter, spec=spec)


def regions_of(parameters: Sequence[ShardedParameter]) -> Iterator[tuple[Region, Tensor]]:
    """Each region with the part of its parameter that holds it (a view with the whole tensor's dimensions)."""
    for sharded in parameters:
        for region in sharded.spec.regions:
            if 0 not in region.shape:
                yield region, region.part_of(sharded.parameter.data)


@torch.no_grad()
def initialise(parameters: Sequence[ShardedParameter], seed: int) -> None:
    """Fill each parameter with values that depend on seed, whole tensor's name and place in it only.

    Padding becomes zero; a parameter without an initialiser is left as its module made it.
    """
    for sharded in parameters:
        if sharded.spec.initialiser is None:
            continue
        sharded.parameter.zero_()
        for region, part in regions_of([sharded]):
            sharded.spec.initialiser.fill(part, seed, region.name, region.whole_shape, region.start)


def _is_norm(module: nn.Module) -> bool:
    """Every library has norms of its own, and each calls them so."""
    return type(module).__name__.endswith("Norm")


def _absolute(prefix: str, name: str) -> str:
    """``model.attn.qkv_proj`` + ``../q_proj.weight`` -> ``model.attn.q_proj.weight``."""
    climbs = name.count("../")
    path = prefix.split(".") if prefix else []
    return ".".join([*path[: len(path) - climbs], name.removeprefix("../" * climbs)])
