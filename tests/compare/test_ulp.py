"""Distances are exact whole numbers for any two numbers of a dtype, and no bit that differs goes unseen."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from argonne.compare import ulp
from argonne.compare.ulp import Difference, difference, distance, distance_told, distances

FORMATS = {torch.float64: ("d", "Q"), torch.float32: ("f", "I"), torch.float16: ("e", "H")}
FLOATS = st.sampled_from(list(FORMATS))
NO_NAN = st.floats(allow_nan=False)


def ordered(value: float, dtype: torch.dtype) -> int:
    """The place of a number in the order of its dtype, by Python's own whole numbers."""
    number, whole = FORMATS[dtype]
    magnitude = struct.unpack(whole, struct.pack(number, abs(value)))[0]
    return -magnitude if math.copysign(1, value) < 0 else magnitude


@given(FLOATS, NO_NAN, NO_NAN)
def test_distance_is_that_of_the_places_in_the_order(dtype: torch.dtype, one: float, other: float) -> None:
    one, other = (torch.tensor(value, dtype=torch.float64).to(dtype).item() for value in (one, other))
    assert distance(one, other, dtype) == abs(ordered(one, dtype) - ordered(other, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_sixteen_bits_is_one_ulp_from_its_neighbour(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = every[~every.isnan()]
    values, order = numbers.double().sort()
    steps = distances(numbers[order][:-1], numbers[order][1:])
    same = (values[:-1] == values[1:]).numpy()
    assert same.sum() == 1  # the two zeros
    assert (steps == np.where(same, 0, 1)).all()


def test_the_largest_distance_of_float64_needs_64_bits() -> None:
    assert distance(-math.inf, math.inf, torch.float64) == 2 * 0x7FF0000000000000 > 2**63


@given(FLOATS, NO_NAN, st.integers(1, 9))
def test_neighbours_are_as_far_as_they_were_stepped(dtype: torch.dtype, start: float, steps: int) -> None:
    one = torch.tensor(start, dtype=torch.float64).to(dtype).clamp(-1000, 1000)
    other = one
    for _ in range(steps):
        other = torch.nextafter(other.double() if dtype is torch.float64 else other, torch.tensor(torch.inf).to(dtype))
    assert distance(one.item(), other.item(), dtype) == steps


def test_a_zero_of_other_sign_differs_by_no_ulp() -> None:
    zeros = torch.zeros(2, 3)
    other = zeros.clone()
    other[1, 0] = -0.0
    assert difference(zeros, other) == Difference(1, (1, 0), 0, 0)
    assert distance_told(0, torch.float32) == "0 ulp of float32 (zeros of other sign)"


def test_nan_equals_nan_of_the_same_bits_only() -> None:
    bits = torch.tensor([0x7FC00000, 0x7FC00001, 0x3F800000], dtype=torch.int32)
    values = bits.view(torch.float32)
    assert difference(values, values.clone()) is None
    other_bits, number = bits.clone(), values.clone()
    other_bits[1] += 1
    assert difference(values, other_bits.view(torch.float32)) == Difference(1, (1,), None, 1)
    number[1], number[2] = 4.0, torch.nextafter(number[2], torch.tensor(2.0))
    found = difference(values, number)
    assert found == Difference(2, (1,), 1, 1)
    assert found.told(values, number) == (
        "2 of 3 elements differ, first at [1] (nan against 4.0), by at most 1 ulp of float32, 1 with NaN"
    )


@pytest.mark.parametrize("dtype", [*ulp.DTYPES, torch.int64, torch.bool])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_elements_that_differ_are_counted_and_the_first_is_named(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr(ulp, "_CHUNK", chunk)
    one = (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype)
    other = one.clone()
    for index in ((0, 2, 3), (1, 0, 0), (1, 2, 2)):
        other[index] = 1 - other[index].int()
    found = difference(one, other)
    assert found is not None
    assert (found.count, found.first, found.nan) == (3, (0, 2, 3), 0)
    assert found.ulp == (distance(0.0, 1.0, dtype) if dtype in ulp.DTYPES else None)
    assert difference(one, one.clone()) is None


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_tensors_of_one_element_or_none(shape: tuple[int, ...]) -> None:
    one = torch.ones(shape)
    assert difference(one, one.clone()) is None
    assert difference(one, one * 2) == (Difference(1, (), 2**23, 0) if shape == () else None)


def test_what_is_worst_is_nan_then_distance_then_number() -> None:
    found = [
        Difference(9, (0,), 5, 0),
        Difference(1, (0,), 6, 0),
        Difference(1, (0,), None, 1),
        Difference(8, (0,), 5, 0),
    ]
    assert sorted(found, key=lambda each: each.badness, reverse=True) == [found[2], found[1], found[0], found[3]]
