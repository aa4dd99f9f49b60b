"""The declarations that come again and again: a parameter on every rank, an even cut, the transpose of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.communication.layout import require_divisible
from argonne.parallel.errors import LayoutError
from argonne.parallel.sharding.initialisation import Initialiser
from argonne.parallel.sharding.region import Region, ShardSpec

Use = Literal["between", "inside", "outside"]
"""Where a parameter that every tensor-parallel rank holds is used.

- ``between`` the column-row pairs, where every rank does the same for all tokens, or under sequence parallelism for its
  share of them: a norm, the bias of a row-parallel layer, a router on the residual stream.
- ``inside`` a pair, where all tokens are, and each rank has some of the features or heads: one weight for all heads.
- ``outside``: where every rank does the same for all tokens, under sequence parallelism too: before the tokens are
  shared out (patches, positions, a class token), or after they are gathered again (a head on ``gather_from_region``).
"""


def replicated(
    name: str,
    shape: Sequence[int],
    groups: ProcessGroups,
    initialiser: Initialiser | None = None,
    partial_gradient: bool | None = None,
    used: Use | None = None,
) -> ShardSpec:
    """The spec of a parameter that every tensor-parallel rank holds whole.

    Args:
        initialiser: how it begins; None: the module has initialised it.
        partial_gradient: whether each rank has only a part of the gradient, where ``used`` does not say it.
        used: where it is used, from which follows whether the gradient is partial: ``inside`` always, ``between`` under
            sequence parallelism, ``outside`` never. With neither of the two it is as ``between``, but for sequence
            parallelism, where nothing is guessed.

    Raises:
        LayoutError: both are given, or neither is under sequence parallelism, or ``used`` is another word.
    """
    if used is not None and used not in get_args(Use):
        raise LayoutError(f"used={used!r} of replicated({name!r}) is not known; legal: {', '.join(get_args(Use))}")
    if used is not None and partial_gradient is not None:
        raise LayoutError(f"replicated({name!r}) has used={used!r} and partial_gradient={partial_gradient}; legal: one")
    if used is None and partial_gradient is None and groups.sequence_parallel:
        raise LayoutError(
            f"replicated({name!r}) does not say where the parameter is used, on which its gradient depends under "
            "sequence parallelism; legal: used='between', 'inside' or 'outside'"
        )
    if partial_gradient is None:
        partial_gradient = used == "inside" or (used == "between" and groups.sequence_parallel)
    shape = tuple(shape)
    start = (0,) * len(shape)
    region = Region(name, shape, start, shape, start, tuple(range(groups.tensor.size)), partial_gradient)
    return ShardSpec((region,), initialiser)


def sharded(
    name: str, whole_shape: Sequence[int], dim: int, groups: ProcessGroups, initialiser: Initialiser | None = None
) -> ShardSpec:
    """The spec of this rank's equal part of a whole tensor, cut along ``dim`` over the tensor-parallel ranks.

    Raises:
        LayoutError: there is no such dimension, or it cannot be cut into equal parts.
    """
    whole, ranks, rank = tuple(whole_shape), groups.tensor.size, groups.tensor.rank
    if not -len(whole) <= dim < len(whole):
        raise LayoutError(f"dim={dim} of sharded({name!r}) is none of {list(whole)}; legal: 0 to {len(whole) - 1}")
    dim %= len(whole)
    require_divisible(f"dimension {dim} of {name}", whole[dim], "tensor_parallel", ranks)
    extent = whole[dim] // ranks
    held = range(rank * extent, (rank + 1) * extent)
    return ShardSpec((Region.slab(name, whole, dim, held, (rank,)),), initialiser)


def transposed(spec: ShardSpec) -> ShardSpec:
    """The spec of the same parameter where the whole tensors are kept with their dimensions in reverse order.

    A ``Conv1D`` of GPT-2, whose weight ``[in, out]`` a linear layer holds as ``[out, in]``, is
    ``transposed(super().shard_specs()["weight"])``.
    """

    def reverse(region: Region) -> Region:
        return replace(
            region,
            whole_shape=region.whole_shape[::-1],
            start=region.start[::-1],
            shape=region.shape[::-1],
            transposed=not region.transposed,
        )

    return replace(spec, regions=tuple(reverse(region) for region in spec.regions))
