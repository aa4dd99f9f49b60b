from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import DataError
from argonne.data.cache.permutation import Permutation

seeds = st.integers(-(2**70), 2**70)
epochs = st.integers(0, 2**40)


def order(length: int, seed: int, epoch: int) -> list[int]:
    permutation = Permutation(length, seed, epoch)
    return [permutation(place) for place in range(length)]


def chi_square(counts: np.ndarray) -> float:
    expected = counts.mean()
    return float(((counts - expected) ** 2 / expected).sum())


def far_out(degrees: int) -> float:
    """What chi-square stays below but once in a million (Wilson and Hilferty's approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * (2 / (9 * degrees)) ** 0.5) ** 3


@given(st.integers(1, 700), seeds, epochs)
def test_every_number_stands_at_exactly_one_place(length: int, seed: int, epoch: int) -> None:
    assert sorted(order(length, seed, epoch)) == list(range(length))


@given(st.integers(1, 2**62), seeds, epochs, st.data())
def test_places_of_a_long_order_differ_and_are_in_range(length: int, seed: int, epoch: int, data) -> None:
    places = data.draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=50))
    permutation = Permutation(length, seed, epoch)
    found = {permutation(place) for place in places}
    assert len(found) == len(places)
    assert all(0 <= number < length for number in found)


@given(st.integers(30, 500), st.integers(0, 10**6), st.integers(0, 10**6))
def test_each_epoch_and_each_seed_has_an_order_of_its_own(length: int, seed: int, epoch: int) -> None:
    plain = order(length, seed, epoch)
    assert plain == order(length, seed, epoch)
    assert plain != list(range(length))
    for other in (order(length, seed, epoch + 1), order(length, seed + 1, epoch), order(length, epoch, seed)):
        assert other != plain or seed == epoch


def test_known_answers_hold_for_ever() -> None:
    assert order(10, seed=0, epoch=0) == [6, 8, 1, 2, 5, 9, 3, 0, 7, 4]
    long = Permutation(10**15, seed=7, epoch=3)
    assert [long(place) for place in (0, 1, 10**15 - 1)] == [731557574901448, 633432958250939, 982158433970492]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_all_orders_of_a_few_things_are_equally_likely(length: int) -> None:
    every = dict.fromkeys(permutations(range(length)), 0)
    for epoch in range(60 * len(every)):
        every[tuple(order(length, 11, epoch))] += 1
    assert chi_square(np.array(list(every.values()))) <= far_out(max(1, len(every) - 1))


@pytest.mark.parametrize("length", [16, 50, 64])
def test_every_number_is_equally_likely_at_every_place(length: int) -> None:
    drawn = 1500
    counts = np.zeros((length, length))
    for epoch in range(drawn):
        counts[np.arange(length), order(length, 5, epoch)] += 1
    assert chi_square(counts) < far_out((length - 1) ** 2)


def test_neighbours_are_thrown_far_apart() -> None:
    length = 10_000
    numbers = np.array(order(length, seed=1, epoch=0))
    # The mean distance of two numbers drawn at random is a third of the length.
    assert abs(np.abs(np.diff(numbers)).mean() / length - 1 / 3) < 0.02
    steps = Counter(np.diff(numbers).tolist())
    assert max(steps.values()) < 12
    # Where a quarter of the places lands says nothing of the numbers: each quarter gets its share.
    assert chi_square(np.bincount(numbers[: length // 4] * 16 // length, minlength=16)) < far_out(15)


def test_a_length_or_place_out_of_range_is_refused() -> None:
    with pytest.raises(DataError, match="length=0 of a permutation"):
        Permutation(0, 1, 2)
    for place in (-1, 5):
        with pytest.raises(IndexError, match=f"place {place} is outside 0 to 4"):
            Permutation(5, 1, 2)(place)
