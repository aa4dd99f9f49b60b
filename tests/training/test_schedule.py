"""The learning rate is a pure function of the step: warm-up, one of four curves, and one return after a reset."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.parallel import ArgonneError
from argonne.training.schedule import FALL, Kind, Schedule, Shape
from argonne.training.training_flags import TrainingFlags

PLAIN = Schedule(peak=1e-3, minimum=1e-5, warmup_steps=10, total_steps=110)
KINDS: tuple[Kind, ...] = ("cosine", "wsd", "linear", "constant")

# The curves once more, by other arithmetic.
AFTER: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
    "linear": lambda x: -(x - 1),
    "sqrt": lambda x: (1 - x) / (1 + x**0.5),
}


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    peak = draw(st.floats(1e-6, 1.0))
    total, warmup = draw(st.integers(1, 500)), draw(st.integers(0, 600))
    kind, shape = draw(st.sampled_from(KINDS)), draw(st.sampled_from(sorted(FALL)))
    decay = draw(st.integers(0, max(0, total - warmup)))
    return Schedule(peak, peak * draw(st.floats(0, 1)), warmup, total, 0, 0, kind, decay, shape)


def closed_form(schedule: Schedule, step: int) -> float:
    """The height between minimum and peak, case by case."""
    w, t, d = schedule.warmup_steps, schedule.total_steps, schedule.decay_steps
    if step <= w:
        return step / w
    if schedule.kind == "constant" or (schedule.kind == "wsd" and step <= t - d):
        return 1.0
    if step >= t:
        return 0.0
    if schedule.kind == "wsd":
        return AFTER[schedule.decay_shape]((step - (t - d)) / d)
    return AFTER[schedule.kind]((step - w) / (t - w))


def test_the_corners_are_the_minimum_the_peak_and_the_minimum_again() -> None:
    assert PLAIN.learning_rate(10) == pytest.approx(1e-3, rel=1e-12)
    assert PLAIN.learning_rate(60) == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-12)
    assert PLAIN.learning_rate(110) == pytest.approx(1e-5, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("linear", "linear", (1.0, 0.75, 0.5, 0.25, 0.0)),
        ("constant", "linear", (1.0,) * 5),
        ("wsd", "linear", (1.0, 1.0, 1.0, 0.5, 0.0)),
        ("wsd", "cosine", (1.0, 1.0, 1.0, 0.5, 0.0)),
        ("wsd", "sqrt", (1.0, 1.0, 1.0, 1 - 0.5**0.5, 0.0)),
    ],
)
def test_each_curve_by_numbers(kind: Kind, shape: Shape, expected: tuple[float, ...]) -> None:
    """At 10, 35, 60, 85 and 110 of 110 steps with 10 of warm-up, and 50 of decay where there is one."""
    schedule = Schedule(1.0, 0.0, 10, 110, kind=kind, decay_steps=50, decay_shape=shape)
    assert [schedule.learning_rate(step) for step in range(10, 111, 25)] == pytest.approx(expected, abs=1e-15)
    assert [schedule.learning_rate(step) for step in (1, 5)] == [0.1, 0.5]


@given(schedules(), st.integers(1, 700))
def test_every_step_of_every_curve_is_that_of_the_closed_form(schedule: Schedule, step: int) -> None:
    span = schedule.peak - schedule.minimum
    expected = schedule.minimum + span * closed_form(schedule, step)
    assert schedule.learning_rate(step) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(schedules(), st.integers(0, 600), st.integers(0, 200), st.integers(1, 700))
def test_the_rate_of_any_step_lies_between_the_minimum_and_the_peak(
    schedule: Schedule, reset: int, rewarmup: int, step: int
) -> None:
    rate = replace(schedule, rewarmup_after=reset, rewarmup_steps=rewarmup).learning_rate(step)
    assert schedule.minimum * (1 - 1e-9) <= rate <= schedule.peak * (1 + 1e-9)


@given(schedules())
def test_the_rate_rises_to_the_end_of_the_warm_up_and_never_after_it(schedule: Schedule) -> None:
    rates = [schedule.learning_rate(step) for step in range(1, schedule.total_steps + 2)]
    top = min(max(schedule.warmup_steps, 1), len(rates)) - 1
    slack = 1e-15 + schedule.peak * 1e-12
    assert all(b >= a - slack for a, b in pairwise(rates[: top + 1]))
    assert all(b <= a + slack for a, b in pairwise(rates[top:]))


def test_without_warm_up_the_first_step_is_near_the_peak() -> None:
    schedule = Schedule(1.0, 0.0, 0, 1000)
    assert 0.9999 < schedule.learning_rate(1) < 1.0


@given(schedules(), st.integers(0, 500), st.integers(0, 100))
def test_after_a_reset_the_rate_returns_linearly_from_the_minimum_to_the_curve(
    schedule: Schedule, reset: int, steps: int
) -> None:
    """In a decay too; and no step before the reset is another."""
    resumed = replace(schedule, rewarmup_after=reset, rewarmup_steps=steps)
    for step in range(1, 700, 7):
        height = schedule.learning_rate(step) - schedule.minimum
        share = min(1.0, (step - reset) / steps) if step > reset and steps else 1.0
        assert resumed.learning_rate(step) == pytest.approx(schedule.minimum + height * share, rel=1e-9, abs=1e-15)
        if step <= reset:
            assert resumed.learning_rate(step) == schedule.learning_rate(step)


@given(schedules(), st.integers(1, 500), st.integers(0, 500))
def test_a_branch_has_the_bits_of_its_trunk_up_to_where_it_decays(schedule: Schedule, step: int, decay: int) -> None:
    trunk = replace(schedule, kind="wsd", decay_steps=0, total_steps=10**6)
    branch = replace(trunk, decay_steps=decay, total_steps=step + decay)
    assert [trunk.learning_rate(n) for n in range(1, step + 1)] == [branch.learning_rate(n) for n in range(1, step + 1)]
    if decay and step >= trunk.warmup_steps and trunk.peak > trunk.minimum:
        assert branch.learning_rate(step + decay) == trunk.minimum


@given(schedules(), st.integers(1, 700))
def test_the_rate_depends_on_nothing_but_the_step(schedule: Schedule, step: int) -> None:
    first = schedule.learning_rate(step)
    schedule.learning_rate(step + 1)
    assert schedule.learning_rate(step) == first


def test_flags_make_the_schedule_and_a_decay_that_is_left_open_takes_the_last_tenth() -> None:
    def made(**flags: object) -> Schedule:
        return TrainingFlags(100, warmup_steps=10, **flags).learning_rates  # type: ignore[arg-type]

    assert made() == Schedule(1e-4, 1e-5, 10, 100)
    assert (made(schedule="wsd").decay_steps, made(schedule="wsd", decay_steps=0).decay_steps) == (10, 0)
    assert made(schedule="wsd", decay_steps=90, decay_shape="sqrt") == Schedule(
        1e-4, 1e-5, 10, 100, kind="wsd", decay_steps=90, decay_shape="sqrt"
    )
    assert TrainingFlags(100, warmup_steps=95, schedule="wsd").learning_rates.decay_steps == 5
    assert TrainingFlags(100, warmup_steps=2000, schedule="wsd").learning_rates.decay_steps == 0
    for decay in (91, 101):
        refused = f"^decay_steps={decay} is not legal, as total_steps=100 less warmup_steps=10 leaves 90; legal"
        with pytest.raises(ArgonneError, match=refused):
            made(schedule="wsd", decay_steps=decay)
