"""A sum of squares that no order and no cut changes, and that is rounded as if it were once."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.communication.groups import Axis
from argonne.parallel.sharding.exact import exact_square_sum
from tests.pool import RankPool

ALONE, CPU = Axis("world"), torch.device("cpu")


def total(*parts: Tensor) -> float:
    found = exact_square_sum(parts, ALONE, CPU)
    assert (found.dtype, found.shape) == (torch.float64, ())
    return found.item()


def rounded(parts: list[Tensor]) -> float:
    """The exact sum, rounded once."""
    return float(sum((Fraction(x) ** 2 for part in parts for x in part.double().flatten().tolist()), Fraction(0)))


def drawn(count: int, spread: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of which some are up to ``10^spread`` times as large as others."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (spread * (torch.rand(count, generator=generator, dtype=torch.float64) - 0.5))
    return (torch.randn(count, generator=generator, dtype=torch.float64) * scale).to(dtype)


@given(st.integers(1, 400), st.floats(0, 60), st.integers(0, 2**31), st.integers(0, 400), st.integers(0, 400))
@example(400, 60.0, 1, 0, 400)
def test_neither_order_nor_cut_changes_a_bit(count: int, spread: float, seed: int, one: int, other: int) -> None:
    x = drawn(count, spread, seed)
    shuffled = x[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    first, last = sorted((min(one, count), min(other, count)))
    expected = rounded([x])
    assert abs(total(x) - expected) <= math.ulp(expected)
    assert total(x) == total(shuffled) == total(x[first:last], x[last:], x[:first]) == total(*x.split(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_summed_to_an_ulp(dtype: torch.dtype) -> None:
    for seed in range(20):
        parts = [drawn(count, 2.0, 7 * seed + count, dtype) for count in (1, 50, 300)]
        expected = rounded(parts)
        # The squares of float64 are themselves rounded, each by half a unit.
        slack = 1 if dtype != torch.float64 else 2
        assert abs(total(*parts) - expected) <= slack * math.ulp(expected), f"seed {seed}"


def test_more_than_one_chunk_is_summed_alike() -> None:
    x = drawn(600_000, 4.0, 3)
    expected = math.fsum((x.double() ** 2).tolist())
    assert abs(total(x) - expected) <= math.ulp(expected)
    assert total(x) == total(x[::2].contiguous(), x[1::2].contiguous()) == total(x.view(600, 1000).t())


def test_the_largest_and_the_smallest_of_float32_lie_in_one_sum() -> None:
    huge, tiny = torch.tensor([1e30, -3e30, 3.3e38]), torch.tensor([1e-30, 1e-45, 2e-38])
    assert total(huge, tiny) == total(tiny, huge) == pytest.approx(rounded([huge]), rel=3e-16)
    assert total(tiny) == pytest.approx(rounded([tiny]), rel=3e-16)
    subnormal = torch.full((1000,), 1e-45)
    assert total(subnormal) == rounded([subnormal])


def test_what_is_empty_zero_or_not_finite() -> None:
    x, empty = torch.tensor([3.0, 4.0]), torch.empty(0, 5)
    assert total() == total(empty) == total(torch.zeros(3)) == total(empty, -torch.zeros(2)) == 0
    assert total(empty, x, empty) == 25
    assert total(x, torch.tensor([-math.inf])) == math.inf
    assert math.isnan(total(x, torch.tensor([math.nan])))
    assert math.isnan(total(torch.tensor([math.inf, math.nan]), x))
    assert math.isnan(total(torch.tensor([math.inf]), torch.tensor([math.nan])))


def of_rank(groups: ProcessGroups, cuts: list[int], spread: float, seed: int, special: float) -> float:
    """The sum over all ranks, of which each has a run of the numbers, if it has any."""
    x = drawn(cuts[-1], spread, seed)
    if special:
        x[-1] = special
    rank = groups.world.rank
    own = x[cuts[rank] : cuts[rank + 1]]
    return exact_square_sum(iter(own.split(7)) if len(own) else [], groups.world, CPU).item()


def test_every_rank_has_the_sum_of_one_that_has_all(ranks: RankPool) -> None:
    @given(
        st.lists(st.integers(0, 200), min_size=2, max_size=2).map(lambda inner: [0, *sorted(inner), 200]),
        st.floats(0, 60),
        st.integers(0, 2**31),
    )
    @example([0, 0, 0, 200], 30.0, 5)
    def claim(cuts: list[int], spread: float, seed: int) -> None:
        found = ranks.run(Layout(data=3), of_rank, cuts, spread, seed, 0.0)
        assert found == [total(drawn(200, spread, seed))] * 3

    claim()
    assert ranks.run(Layout(data=3), of_rank, [0, 50, 60, 200], 3.0, 1, math.inf) == [math.inf] * 3
    assert all(map(math.isnan, ranks.run(Layout(data=3), of_rank, [0, 50, 60, 200], 3.0, 1, math.nan)))
