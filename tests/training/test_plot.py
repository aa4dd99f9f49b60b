"""The plot of a run of any length: bounded memory, and the picture that all points would give."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.training.plot import PARTS, Outline, Point, plot_loss


def curve(steps: int) -> list[Point]:
    draw = random.Random(5)
    return [(128 * step, 8 * step**-0.2 + draw.gauss(0, 0.1) + (step % 9_973 == 0)) for step in range(1, steps + 1)]


def outline(points: list[Point]) -> list[Point]:
    shape = Outline()
    for point in points:
        shape.add(*point)
    return shape.points


@given(st.integers(0, 2 * PARTS - 1))
def test_a_short_curve_keeps_every_point(steps: int) -> None:
    assert outline(curve(steps)) == curve(steps)


@pytest.mark.parametrize("steps", [3 * PARTS, 4 * PARTS - 1, 100_003])
def test_a_long_curve_keeps_its_ends_and_extremes_in_a_bounded_number_of_its_points(steps: int) -> None:
    points = curve(steps)
    kept = outline(points)
    assert len(kept) <= 4 * PARTS
    assert set(kept) <= set(points)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    for extreme in (min, max):
        assert extreme(kept, key=lambda point: point[1]) == extreme(points, key=lambda point: point[1])


def test_a_long_curve_gives_the_picture_of_all_its_points(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    points = curve(50_000)
    held_out = points[::499]
    plot_loss(points, held_out, tmp_path / "all.png", "a run")
    plot_loss(outline(points), outline(held_out), tmp_path / "outline.png", "a run")
    whole, drawn = (image.imread(tmp_path / f"{name}.png")[..., :3] for name in ("all", "outline"))
    apart = np.abs(whole - drawn)
    # Antialiasing differs along the edge of the band of noise; no line is elsewhere.
    assert apart.mean() < 0.01
    assert (apart.max(-1) > 0.5).mean() < 0.01


def test_a_plot_that_cannot_be_drawn_leaves_the_one_before(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.png"
    assert plot_loss([(1, 2.0), (2, 1.0)], [], path, "one")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="mathtext|Parse"):
        plot_loss([(1, 2.0)], [], path, r"$\nothing{$")
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["loss.png"]
