"""The shape of a step's batch."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
