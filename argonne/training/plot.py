"""``loss.png``: the loss against tokens, from as many points as a picture can show."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from argonne.files import replacing

Point = tuple[float, float]

PARTS = 1024  # even; more than the columns of pixels that the picture has for the curve


class Outline:
    """A curve of any length by a bounded number of its own points, of which the same picture is drawn.

    The curve is cut into parts of equally many points. Of each part the first, the lowest, the highest and the last
    are kept. When there are ``PARTS`` parts, neighbours become one. So what is kept depends on the points alone.
    """

    def __init__(self) -> None:
        self._parts: list[list[Point]] = []
        self._last: list[Point] = []
        self._count, self._width = 0, 1  # points in the last part so far, and in each of the others

    def add(self, x: float, y: float) -> None:
        """The next point."""
        self._last = _outline([*self._last, (x, y)])
        self._count += 1
        if self._count < self._width:
            return
        self._parts.append(self._last)
        self._last, self._count = [], 0
        if len(self._parts) == PARTS:
            pairs = zip(self._parts[::2], self._parts[1::2], strict=True)
            self._parts = [_outline(one + two) for one, two in pairs]
            self._width *= 2

    @property
    def points(self) -> list[Point]:
        """At most four times ``PARTS`` points, in their order."""
        return [point for part in [*self._parts, self._last] for point in part]


def _outline(points: list[Point]) -> list[Point]:
    heights = [y for _, y in points]
    chosen = {0, heights.index(min(heights)), heights.index(max(heights)), len(points) - 1}
    return [points[index] for index in sorted(chosen)]


def plot_loss(
    training: Sequence[Point],
    held_out: Sequence[Point],
    path: Path,
    title: str,
    named: Mapping[str, tuple[Sequence[Point], Sequence[Point]]] = MappingProxyType({}),
) -> bool:
    """Draw training and held-out loss (there may be none) against tokens as a PNG; False without matplotlib.

    ``named`` are loss and bits per byte of each named held-out set; the latter are dashed, on an axis of their own.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*_columns(training), label="training", color="tab:blue", linewidth=1, alpha=0.8)
    if held_out:
        axes.plot(*_columns(held_out), label="held out", color="tab:orange", marker="o", markersize=4)
    if named:
        _plot_named(axes, named)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if value >= 1e5 else f"{value:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    # A figure holds itself, a megabyte; the collector does not come by for hundreds of saves of a large process.
    del figure, axes
    gc.collect()
    return True


def _plot_named(axes: Any, named: Mapping[str, tuple[Sequence[Point], Sequence[Point]]]) -> None:
    beside = axes.twinx() if any(bits for _, bits in named.values()) else None
    if beside is not None:
        beside.set_ylabel("bits per byte (dashed)")
    for number, (name, (loss, bits)) in enumerate(named.items()):
        color = f"C{(number + 2) % 10}"  # the first two are those of training and held-out text
        axes.plot(*_columns(loss), label=name, color=color, marker="o", markersize=3)
        if beside is not None:
            beside.plot(*_columns(bits), color=color, linestyle="dashed", linewidth=1)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
