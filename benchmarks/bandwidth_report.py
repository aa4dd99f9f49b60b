"""The report of ``tp_allreduce``: its tables on screen and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.memory import size_text
from benchmarks.report import table

_HEADER = ("size", "calls", "median us", "min us", "max us", "algbw GB/s", "busbw GB/s", "of NVLink", "wrong")


def against_peak(record: dict[str, Any], nvlink: dict[str, Any] | str) -> dict[str, Any]:
    """``record`` with its bus bandwidth as a fraction of NVLink's peak, None where that is not known."""
    fraction = record["busbw_gb_per_s"] / nvlink["peak_gb_per_s"] if isinstance(nvlink, dict) else None
    return {**record, "of_nvlink": fraction}


def wrong_elements(report: dict[str, Any]) -> int:
    """The elements, over every checked result, that were not exactly what they must be."""
    symmetric = [result for result in report["symmetric_memory"].values() if isinstance(result, list)]
    return sum(record["wrong"] for part in (report["sweep"], report["activations"], *symmetric) for record in part)


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    nvlink = report["nvlink"]
    if isinstance(nvlink, dict):
        nvlink = f"{nvlink['peak_gb_per_s']:.1f} GB/s one way over {nvlink['links']} links"
    print(f"\n{report['ranks']} ranks, {report['backend']}, {report['dtype']}. NVLink: {nvlink}.")
    print("Times are of the slowest rank; bandwidths are of the median.")
    print(table(("collective", *_HEADER), [_row(record["collective"], record) for record in report["sweep"]]))
    if report["activations"]:
        print(f"\nActivation all-reduce, [{report['activations'][0]['tokens']} tokens, hidden]")
        print(table(("preset", *_HEADER), [_row(record["preset"], record) for record in report["activations"]]))
    if report["overlap"]:
        print("\nAll-reduce started before the matrix product of the weight gradient, waited for after it")
        header = ("preset", "product", "gemm us", "collective us", "both us", "hidden", "quartiles")
        print(table(header, [_overlap_row(record) for record in report["overlap"]]))
    print("\nAll-reduce over symmetric memory")
    for name, result in report["symmetric_memory"].items():
        if isinstance(result, str):
            print(f"{name}: {result}")
        else:
            print(table((name, *_HEADER), [_row("", record) for record in result]))


def _row(label: str, record: dict[str, Any]) -> list[str]:
    times = [f"{record[f'{name}_us']:.1f}" for name in ("median", "min", "max")]
    speeds = [f"{record[f'{name}_gb_per_s']:.4g}" for name in ("algbw", "busbw")]
    fraction = "-" if record["of_nvlink"] is None else f"{record['of_nvlink']:.1%}"
    return [
        label,
        size_text(record["bytes"]),
        str(record["iterations"]),
        *times,
        *speeds,
        fraction,
        str(record["wrong"]),
    ]


def _overlap_row(record: dict[str, Any]) -> list[str]:
    product = f"[{record['width']}, {record['tokens']}] @ [{record['tokens']}, {record['hidden']}]"
    times = [f"{record[f'{name}_median_us']:.1f}" for name in ("gemm", "collective", "both")]
    low, high = record["hidden_fraction_quartiles"]
    hidden = f"{min(max(record['hidden_fraction'], 0.0), 1.0):.0%}"
    return [record["preset"], product, *times, hidden, f"{low:.0%} to {high:.0%}"]


def plot_bandwidths(report: dict[str, Any], path: Path) -> bool:
    """Draw bus bandwidth against message size, and NVLink's peak where known; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in dict.fromkeys(record["collective"] for record in report["sweep"]):
        points = [record for record in report["sweep"] if record["collective"] == name]
        speeds = [record["busbw_gb_per_s"] for record in points]
        axes.plot([record["bytes"] for record in points], speeds, label=name, marker="o", markersize=4)
    if isinstance(report["nvlink"], dict):
        peak = report["nvlink"]["peak_gb_per_s"]
        axes.axhline(peak, label="NVLink peak, one way", color="black", linestyle="--", linewidth=1)
    machine = report["environment"].get("gpu") or report["environment"]["cpu"]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="message (bytes)", ylabel="bus bandwidth (GB/s)")
    axes.set_title(f"{report['ranks']} ranks over {report['backend']}, {report['dtype']}: {machine}", fontsize=10)
    sizes = sorted({record["bytes"] for record in report["sweep"]})
    axes.set_xticks(sizes, [size_text(size) for size in sizes], fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
