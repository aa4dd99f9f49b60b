"""The shape of a step's batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import Assignment
from argonne.parallel.data_parallel.kinds import Kind
from argonne.parallel.errors import ArgonneError
from argonne.training.batch_shape import BatchShape

SIZES = st.integers(1, 12)


def test_global_batch_tokens_and_ids_follow_from_the_four_sizes() -> None:
    shape = BatchShape(micro_batch=3, accumulation=5, replicas=2, block_size=7)
    assert shape.global_batch == 30
    assert shape.tokens_per_step == 210
    assert shape.ids == (5, 3, 8)


@given(SIZES, SIZES, SIZES, SIZES)
def test_a_shape_that_keeps_its_own_global_batch_is_the_same_shape(
    micro: int, steps: int, ranks: int, block: int
) -> None:
    shape = BatchShape(micro, steps, ranks, block)
    assert BatchShape.keeping(shape.global_batch, micro, ranks, block) == shape


@given(st.integers(1, 200), SIZES, SIZES)
def test_a_global_batch_is_kept_exactly_or_refused_by_name(batch: int, micro: int, ranks: int) -> None:
    if batch % (micro * ranks) == 0:
        assert BatchShape.keeping(batch, micro, ranks, 16).global_batch == batch
        return
    with pytest.raises(ArgonneError, match=f"^micro-batch {micro} x data_parallel={ranks} does not divide the run's"):
        BatchShape.keeping(batch, micro, ranks, 16)


def test_a_shape_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BatchShape(1, 1, 1, 1).micro_batch = 2  # type: ignore[misc]


KINDS: tuple[Kind, ...] = ("replicate", "zero1", "fsdp")


def test_a_reproducible_run_deals_out_leaves_as_its_kind_adds_them_up() -> None:
    shape = BatchShape(3, 4, 2, 16)
    for kind in KINDS:
        assert shape.assignment(kind, reproducible=False) == Assignment(3, 4, 2, "interleaved")
        leaves = "strided" if kind == "fsdp" else "contiguous"
        assert shape.assignment(kind, reproducible=True) == Assignment(3, 4, 2, leaves)


def tree(parts: Sequence[Any]) -> Any:
    """The aligned binary tree over ``parts`` as nested pairs: neighbours first, an odd one out carried up."""
    while len(parts) > 1:
        parts = [tuple(parts[n : n + 2]) if n + 1 < len(parts) else parts[n] for n in range(0, len(parts), 2)]
    return parts[0]


def sums(shape: BatchShape, kind: Kind) -> Iterator[Any]:
    """What is added up first: a replica's micro-batches, or under FSDP the replicas' of one micro-batch."""
    assignment = shape.assignment(kind, reproducible=True)
    leaves = [assignment.samples(replica, 0)[:, 0].tolist() for replica in range(shape.replicas)]
    for branch in zip(*leaves, strict=True) if kind == "fsdp" else leaves:
        yield tree(branch)


@pytest.mark.parametrize("kind", KINDS)
def test_the_replicas_that_are_legal_are_those_whose_sums_make_the_tree_of_one_process(kind: Kind) -> None:
    for leaves in range(1, 33):
        whole, legal, refused = tree(list(range(leaves))), [], {}
        for replicas in (size for size in range(1, leaves + 1) if leaves % size == 0):
            shape = BatchShape(1, leaves // replicas, replicas, 16)
            try:
                shape.check_reproducible(kind)
                legal.append(replicas)
            except ArgonneError as error:
                refused[replicas] = str(error)
            assert (replicas in legal) == (tree(list(sums(shape, kind))) == whole), shape
        for message in refused.values():
            assert message.endswith(f"legal data_parallel sizes: {', '.join(map(str, legal))}")


@pytest.mark.parametrize(
    ("kind", "accumulation", "replicas", "message"),
    [
        (
            "zero1",
            6,
            4,
            "data_parallel=4 with gradient_accumulation_steps=6 is not reproducible as zero1: a sum over 6 "
            "micro-batches is no branch of the binary tree over the 24 of a step; "
            "legal data_parallel sizes: 1, 3, 6, 12, 24",
        ),
        (
            "fsdp",
            4,
            6,
            "data_parallel=6 with gradient_accumulation_steps=4 is not reproducible as fsdp: a sum over 6 "
            "micro-batches is no branch of the binary tree over the 24 of a step; "
            "legal data_parallel sizes: 1, 2, 4, 8, 24",
        ),
    ],
)
def test_sums_that_are_no_branch_of_the_tree_are_refused_by_name(
    kind: Kind, accumulation: int, replicas: int, message: str
) -> None:
    with pytest.raises(ArgonneError) as refusal:
        BatchShape(2, accumulation, replicas, 16).check_reproducible(kind)
    assert str(refusal.value) == message
