"""Who has which samples: each has one owner, and leaves are the same micro-batches however many replicas there are."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import Assignment, DataError
from argonne.data.assignment import Order

ORDERS = get_args(Order)
sizes = st.integers(1, 4)
starts = st.integers(0, 200) | st.integers(10**9, 10**9 + 200)
orders = st.sampled_from(ORDERS)


@st.composite
def assignments(draw: st.DrawFn, order: st.SearchStrategy[Order] = orders) -> Assignment:
    return Assignment(draw(sizes), draw(st.integers(1, 8)), draw(st.integers(1, 6)), draw(order))


def owner(assignment: Assignment, number: int) -> tuple[int, int | None]:
    """The definition: the replica of a sample, and its micro-batch where the number alone says it."""
    leaf = number % (assignment.accumulation * assignment.replicas)
    if assignment.order == "contiguous":
        return divmod(leaf, assignment.accumulation)
    replica = number % assignment.replicas
    return replica, leaf // assignment.replicas if assignment.order == "strided" else None


@given(assignments(), starts)
def test_every_sample_is_where_its_number_says_and_in_ascending_order(assignment: Assignment, start: int) -> None:
    found = {}
    for replica in range(assignment.replicas):
        samples = assignment.samples(replica, start)
        assert samples.shape == (assignment.accumulation, assignment.micro_batch)
        for micro_batch, numbers in enumerate(samples.tolist()):
            assert numbers == sorted(numbers)
            for number in numbers:
                assert number not in found
                found[number] = replica
                whose, which = owner(assignment, number)
                assert whose == replica
                assert which in (micro_batch, None)
    assert sorted(found) == list(range(start, start + assignment.global_batch))


@given(sizes, st.integers(1, 8), st.integers(1, 6), starts)
def test_interleaved_samples_are_cut_in_a_row(micro_batch: int, accumulation: int, replicas: int, start: int) -> None:
    assignment = Assignment(micro_batch, accumulation, replicas)
    for replica in range(replicas):
        own = [k for k in range(start, start + assignment.global_batch) if k % replicas == replica]
        assert assignment.samples(replica, start).reshape(-1).tolist() == own


@given(sizes, st.integers(1, 24), starts)
def test_a_leaf_is_the_same_micro_batch_however_many_replicas_share_them(
    micro_batch: int, leaves: int, start: int
) -> None:
    alone = Assignment(micro_batch, leaves, 1, "contiguous").samples(0, start)
    for leaf, numbers in enumerate(alone.tolist()):
        assert numbers == [k for k in range(start, start + micro_batch * leaves) if k % leaves == leaf]
    for replicas in (size for size in range(1, leaves + 1) if leaves % size == 0):
        accumulation = leaves // replicas
        rows = Assignment(micro_batch, accumulation, replicas, "contiguous")
        turns = Assignment(micro_batch, accumulation, replicas, "strided")
        of_rows = np.stack([rows.samples(d, start) for d in range(replicas)])
        of_turns = np.stack([turns.samples(d, start) for d in range(replicas)], axis=1)
        for found in (of_rows, of_turns):
            np.testing.assert_array_equal(found.reshape(leaves, micro_batch), alone)


@given(assignments(), starts)
def test_places_put_what_the_replicas_have_in_the_order_of_the_numbers(assignment: Assignment, start: int) -> None:
    gathered = np.concatenate([assignment.samples(d, start).reshape(-1) for d in range(assignment.replicas)])
    assert gathered[assignment.places(start)].tolist() == list(range(start, start + assignment.global_batch))


@given(assignments(), st.integers(1, 16), st.integers(0, 50))
def test_a_replica_serves_the_lanes_that_its_samples_come_from_and_no_others(
    assignment: Assignment, lanes: int, start: int
) -> None:
    readers = dict.fromkeys(range(lanes), 0)
    for replica in range(assignment.replicas):
        steps = (start + step * assignment.global_batch for step in range(lanes))
        own = {number % lanes for first in steps for number in assignment.samples(replica, first).flat}
        assert assignment.served_lanes(replica, lanes) == tuple(sorted(own))
        for lane in own:
            readers[lane] += 1
    assert set(readers.values()) == {assignment.readers(lanes)}


@pytest.mark.parametrize(
    ("assignment", "lanes", "readers"),
    [
        *((Assignment(1, 5, size), 8, 1) for size in (1, 2, 4, 8)),
        *((Assignment(3, 1, size), 8, 3) for size in (3, 6, 12)),
        (Assignment(1, 1, 16), 8, 2),
        (Assignment(2, 3, 5), 8, 5),
        (Assignment(2, 4, 2, "contiguous"), 8, 1),
        (Assignment(2, 4, 2, "contiguous"), 4, 2),
        (Assignment(2, 4, 4, "contiguous"), 8, 2),
        (Assignment(2, 4, 4, "strided"), 8, 1),
    ],
    ids=str,
)
def test_every_lane_is_read_by_as_few_ranks_as_hold_its_samples(
    assignment: Assignment, lanes: int, readers: int
) -> None:
    assert assignment.readers(lanes) == readers


def test_the_first_replica_reads_the_first_lane() -> None:
    for order in ORDERS:
        for lanes in (1, 4, 6, 64):
            assert 0 in Assignment(2, 4, 3, order).served_lanes(0, lanes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1), "micro_batch=0 is not a positive number"),
        ((1, -1, 1), "accumulation=-1 is not a positive number"),
        ((1, 1, 0), "replicas=0 is not a positive number"),
        ((1, 1, 1, "sorted"), "order='sorted' of samples is not known; legal: interleaved, contiguous, strided"),
    ],
)
def test_what_is_no_assignment_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Assignment(*arguments)
    for replica in (-1, 4):
        with pytest.raises(DataError, match=f"data-parallel rank {replica} is outside 0 to 3"):
            Assignment(1, 1, 4).served_lanes(replica, 8)
