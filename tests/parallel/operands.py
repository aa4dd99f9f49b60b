"""What the tests of the parallel layers share: operands, partitions, sizes, and a rank's part of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from argonne.parallel import Partition, ProcessGroups, Region, regions_of, sharded_parameters
from tests.whole import assert_close

# At module scope, pytest runs each size in one go, and ranks join a job once.
SIZES = [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)]
KINDS = st.sampled_from(["normal", "integers"])
SEEDS = st.integers(0, 2**31)


def values(*shape: int, kind: str, seed: int) -> Tensor:
    """Normal float64, or small integers in float32: their sums of products are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "integers":
        return torch.randint(-8, 9, shape, generator=generator).float()
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor, kind: str, what: str) -> None:
    """Integers to the bit; 1e-10 leaves room for a lone element that is a small difference of large terms."""
    if kind == "integers":
        assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)} is not {tuple(expected.shape)}"
        assert torch.equal(found, expected), f"{what}: off by {(found - expected).abs().max()} at most"
    else:
        assert_close(found, expected, 1e-10, what)


def fill(layer: nn.Module, groups: ProcessGroups, wholes: dict[str, Tensor]) -> None:
    """Overwrite this rank's parts of the named whole tensors."""
    for region, part in regions_of(sharded_parameters(layer, groups)):
        part.copy_(wholes[region.name][region.whole_index])


def key(region: Region) -> str:
    return region.name.removeprefix("../")


def under(groups: ProcessGroups, sequence: bool) -> ProcessGroups:
    """The same ranks with or without sequence parallelism; they need not join a job again for it."""
    return replace(groups, layout=replace(groups.layout, sequence_parallel=sequence))


def own_tokens(x: Tensor, groups: ProcessGroups) -> Tensor:
    """Of all tokens (dimension 0) those that this rank has between the tensor-parallel layers."""
    return x.chunk(groups.tensor.size)[groups.tensor.rank] if groups.sequence_parallel else x


def whole_tokens(parts: list[Tensor], sequence: bool) -> Tensor:
    """All tokens from what the ranks have between the layers; without sequence parallelism all have the same."""
    if sequence:
        return torch.cat(parts)
    for rank, part in enumerate(parts):
        assert torch.equal(part, parts[0]), f"rank {rank} differs from rank 0 by {(part - parts[0]).abs().max()}"
    return parts[0]


@st.composite
def leading_dimensions(draw: st.DrawFn, size: int, sequence: bool) -> tuple[int, ...]:
    """Those before the features: any, or ones of which the first can be shared out."""
    if sequence:
        return (size * draw(st.integers(1, 3)), *draw(st.lists(st.integers(1, 3), max_size=2)))
    return tuple(draw(st.lists(st.integers(1, 4), max_size=3)))


def attention_parts(heads: int, key_value_heads: int, dim: int, size: int) -> list[Partition]:
    """Query heads shared out in order; each rank has the key-value heads that its query heads use."""
    queries = Partition.blocks("q_proj", dim, heads, size)
    group = heads // key_value_heads
    used = tuple(range(own[0] // group, own[-1] // group + 1) for own in queries.held)
    return [queries, Partition("k_proj", dim, used), Partition("v_proj", dim, used)]


@st.composite
def unshared_part(draw: st.DrawFn, size: int, name: str = "") -> Partition:
    """Equal parts, parts that differ by a feature, or whole heads; of unequal ones some ranks may hold nothing."""
    kinds: list[Callable[[], Partition]] = [
        lambda: Partition.split(name, size * draw(st.integers(1, 4)), size),
        lambda: Partition.split(name, draw(st.integers(1, 4 * size)), size, uneven=True),
        lambda: Partition.blocks(name, draw(st.integers(1, 3)), draw(st.integers(1, 2 * size)), size),
    ]
    return draw(st.sampled_from(kinds))()


@st.composite
def fused_parts(draw: st.DrawFn, size: int) -> tuple[Partition, ...]:
    """What one fused weight may hold: unrelated parts, or queries with keys and values that ranks may share."""
    if draw(st.booleans()):
        return tuple(draw(unshared_part(size, f"part{i}_proj")) for i in range(draw(st.integers(1, 3))))
    key_value_heads = draw(st.integers(1, 4))
    fewest = -(-size // key_value_heads)  # of the query heads, so that every rank has one
    group = draw(st.integers(fewest, fewest + 3))
    return tuple(attention_parts(key_value_heads * group, key_value_heads, draw(st.integers(1, 3)), size))
