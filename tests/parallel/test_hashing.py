"""The hash of a whole tensor is the sum of what its parts add, however it is cut, and sees every change."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import Partition
from argonne.parallel.communication.groups import Axis
from argonne.parallel.sharding import hashing
from argonne.parallel.sharding.hashing import as_copy, hash_of_box, hash_of_part
from argonne.parallel.sharding.placement import Placement

WORD = (1 << 64) - 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)


def whole_hash(x: Tensor) -> int:
    return int(hash_of_box(x, (0,) * x.dim(), tuple(x.shape))) & WORD


def drawn(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.mul(1000).to(dtype) if dtype != torch.bool else values > 0


def by_hand(x: Tensor) -> int:
    """The same in Python's integers."""
    size = x.dtype.itemsize
    total = 0
    for place, value in enumerate(
        x.reshape(-1).view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).tolist()
    ):
        word = (value * 0xD6E8FEB86659FD93 + place * 0x9E3779B97F4A7C15) & WORD
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            word = (word ^ word >> 33) * factor & WORD
        total += word ^ word >> 33
    return total & WORD


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_what_exact_integers_make(dtype: torch.dtype) -> None:
    x = drawn((5, 3, 7), dtype)
    assert whole_hash(x) == by_hand(x)
    assert int(hash_of_part(x[0, 0, 0], (), ())) & WORD == by_hand(x[:1, 0, 0])


@given(st.data())
def test_the_parts_of_any_grid_add_up_to_the_whole(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    x = drawn(shape, data.draw(st.sampled_from(DTYPES)))
    boxes = [((), ())]
    for extent in shape:
        cuts = sorted({0, extent, *data.draw(st.lists(st.integers(0, extent), max_size=3))})
        runs = list(itertools.pairwise(cuts))
        boxes = [((*start, first), (*stop, last)) for start, stop in boxes for first, last in runs]
    total = 0
    for start, stop in boxes:
        part = x[tuple(slice(*span) for span in zip(start, stop, strict=True))]
        total += int(hash_of_box(part, start, shape))
    assert total & WORD == whole_hash(x)


def test_rows_may_be_anywhere_and_memory_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn((40, 6))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    columns = torch.arange(6)
    assert int(hash_of_part(x[order], (order, columns), x.shape)) & WORD == whole_hash(x)
    assert whole_hash(x.t().contiguous().t()) == whole_hash(x)
    monkeypatch.setitem(hashing._CHUNK, "cpu", 13)
    assert whole_hash(x) == by_hand(x)


def test_a_bit_a_sign_of_zero_a_place_and_a_shape_each_show() -> None:
    x = drawn((6, 5))
    before = whole_hash(x)
    found = {before}
    bits = x.view(torch.int32)
    for place in range(30):
        for bit in range(32):
            bits.view(-1)[place] ^= -(1 << 31) if bit == 31 else 1 << bit
            found.add(whole_hash(x))
            bits.view(-1)[place] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert len(found) == 1 + 30 * 32
    assert whole_hash(x) == before
    swaps = {whole_hash(x[[1, 0, *range(2, 6)]]), whole_hash(x.t()), whole_hash(x.flatten()[torch.arange(29, -1, -1)])}
    assert len(swaps | {before}) == 4
    assert whole_hash(torch.zeros(3)) != whole_hash(-torch.zeros(3))


@pytest.mark.parametrize("copies", [1, 2, 3, 8])
def test_copies_count_once_if_they_are_alike_and_otherwise_show(copies: int) -> None:
    one, other = (hash_of_box(drawn((4, 4), seed=seed), (0, 0), (4, 4)) for seed in (0, 1))
    assert int(sum(as_copy(one, number, copies) for number in range(copies))) == int(one)
    for wrong in range(copies if copies > 1 else 0):
        given = (as_copy(other if number == wrong else one, number, copies) for number in range(copies))
        assert int(sum(given)) not in (int(one), int(other))


@pytest.mark.parametrize(
    "parts",
    [
        (Partition.split("", 12, 2),),
        (Partition("q_proj", 2, (range(4), range(4, 6))), Partition("k_proj", 2, (range(2), range(1, 3)))),
        (),
    ],
)
def test_what_ranks_have_of_an_activation_makes_the_wholes(parts: tuple[Partition, ...]) -> None:
    """Equal parts, unequal ones, shared ones, and copies."""
    wholes = {part.name: drawn((3, 2, part.features), seed=n) for n, part in enumerate(parts)} or {"": drawn((3, 2, 9))}
    total = dict.fromkeys(wholes, 0)
    for rank in range(2):
        axis = Axis("tensor", 2, rank)
        own = [
            wholes[part.name][..., [part.block * b + i for b in part.held[rank] for i in range(part.block)]]
            for part in parts
        ]
        for held in Placement(parts).held(torch.cat(own, -1) if own else wholes[""], axis):
            columns = torch.arange(held.first_column, held.first_column + held.values.shape[1])
            found = hash_of_part(held.values, (torch.arange(6), columns), (6, held.features))
            total[held.name] += int(as_copy(found, held.holders.index(rank), len(held.holders)))
    for name, whole in wholes.items():
        assert total[name] & WORD == whole_hash(whole.flatten(0, 1)), name
