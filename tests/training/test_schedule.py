"""The learning rate is a pure function of the step: warm-up, half cosine, and one return after a reset."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.training.schedule import CosineSchedule

PLAIN = CosineSchedule(peak=1e-3, minimum=1e-5, warmup_steps=10, total_steps=110)


@st.composite
def schedules(draw: st.DrawFn) -> CosineSchedule:
    peak = draw(st.floats(1e-6, 1.0))
    total = draw(st.integers(1, 500))
    return CosineSchedule(peak, peak * draw(st.floats(0, 1)), draw(st.integers(0, 600)), total)


def test_the_corners_are_the_minimum_the_peak_and_the_minimum_again() -> None:
    assert PLAIN.learning_rate(10) == pytest.approx(1e-3, rel=1e-12)
    assert PLAIN.learning_rate(60) == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-12)
    assert PLAIN.learning_rate(110) == pytest.approx(1e-5, rel=1e-12)


@given(schedules(), st.integers(1, 700))
def test_warm_up_is_linear_and_the_rest_a_half_cosine(schedule: CosineSchedule, step: int) -> None:
    rate, span = schedule.learning_rate(step), schedule.peak - schedule.minimum
    if step <= schedule.warmup_steps:
        expected = schedule.minimum + span * step / schedule.warmup_steps
    elif step >= schedule.total_steps:
        expected = schedule.minimum
    else:
        done = (step - schedule.warmup_steps) / (schedule.total_steps - schedule.warmup_steps)
        expected = schedule.minimum + span * math.cos(math.pi * done / 2) ** 2
    assert rate == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(schedules(), st.integers(0, 600), st.integers(0, 200), st.integers(1, 700))
def test_the_rate_of_any_step_lies_between_the_minimum_and_the_peak(
    schedule: CosineSchedule, reset: int, rewarmup: int, step: int
) -> None:
    resumed = CosineSchedule(
        schedule.peak, schedule.minimum, schedule.warmup_steps, schedule.total_steps, reset, rewarmup
    )
    rate = resumed.learning_rate(step)
    assert schedule.minimum * (1 - 1e-9) <= rate <= schedule.peak * (1 + 1e-9)


@given(schedules())
def test_the_rate_rises_to_the_end_of_the_warm_up_and_falls_after_it(schedule: CosineSchedule) -> None:
    rates = [schedule.learning_rate(step) for step in range(1, schedule.total_steps + 2)]
    top = min(max(schedule.warmup_steps, 1), len(rates)) - 1
    slack = 1e-15 + schedule.peak * 1e-12
    assert all(b >= a - slack for a, b in pairwise(rates[: top + 1]))
    assert all(b <= a + slack for a, b in pairwise(rates[top:]))


def test_without_warm_up_the_first_step_is_near_the_peak() -> None:
    schedule = CosineSchedule(1.0, 0.0, 0, 1000)
    assert 0.9999 < schedule.learning_rate(1) < 1.0


def test_after_a_reset_the_rate_returns_linearly_from_the_minimum_to_the_curve() -> None:
    resumed = CosineSchedule(1e-3, 1e-5, 10, 110, rewarmup_after=50, rewarmup_steps=20)
    for step in range(51, 111):
        height = PLAIN.learning_rate(step) - 1e-5
        expected = 1e-5 + height * min(1.0, (step - 50) / 20)
        assert resumed.learning_rate(step) == pytest.approx(expected, rel=1e-12), f"step {step}"


def test_a_reset_changes_no_step_before_it() -> None:
    resumed = CosineSchedule(1e-3, 1e-5, 10, 110, rewarmup_after=50, rewarmup_steps=20)
    for step in range(1, 51):
        assert resumed.learning_rate(step) == PLAIN.learning_rate(step), f"step {step}"


@given(schedules(), st.integers(1, 700))
def test_the_rate_depends_on_nothing_but_the_step(schedule: CosineSchedule, step: int) -> None:
    first = schedule.learning_rate(step)
    schedule.learning_rate(step + 1)
    assert schedule.learning_rate(step) == first
