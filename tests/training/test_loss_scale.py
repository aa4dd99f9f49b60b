"""The loss scale falls on an overflow, rises after many steps without, and is 1 for every dtype but float16."""

from __future__ import annotations

import pytest

from argonne.training.loss_scale import GROWTH_INTERVAL, LossScale


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp64"])
def test_only_float16_is_scaled(precision: str) -> None:
    scale = LossScale.of(precision, 8.0)
    for _ in range(GROWTH_INTERVAL + 1):
        scale.succeeded()
    assert scale.scale == 1.0
    assert not scale.overflowed(), "not finite without a scale is a fault of the run"


def test_it_halves_on_each_overflow_until_it_cannot_help() -> None:
    scale = LossScale.of("fp16", 4.0)
    assert [scale.overflowed(), scale.scale] == [True, 2.0]
    assert [scale.overflowed(), scale.scale] == [True, 1.0]
    assert [scale.overflowed(), scale.scale] == [False, 1.0]


def test_it_doubles_after_many_steps_without_an_overflow() -> None:
    scale = LossScale.of("fp16", 4.0)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.succeeded()
    assert scale.scale == 4.0
    scale.overflowed()
    for _ in range(GROWTH_INTERVAL):
        assert scale.scale == 2.0
        scale.succeeded()
    assert scale.scale == 4.0
