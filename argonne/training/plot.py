"""``loss.png``: the loss against tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_loss(records: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw training and held-out loss against tokens; False when matplotlib is not installed.

    Args:
        records: the lines of ``metrics.jsonl``.
        path: the PNG to write.
        title: what the run is.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*_series(records, "loss"), label="training", color="tab:blue", linewidth=1, alpha=0.8)
    held_out = _series(records, "validation_loss")
    if held_out[0]:
        axes.plot(*held_out, label="held out", color="tab:orange", marker="o", markersize=4)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if value >= 1e5 else f"{value:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _series(records: list[dict[str, Any]], field: str) -> tuple[list[int], list[float]]:
    points = [(record["tokens"], record[field]) for record in records if record.get(field) is not None]
    return [tokens for tokens, _ in points], [value for _, value in points]
