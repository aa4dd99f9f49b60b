"""The report of ``kernels``: its tables on screen and its plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_accuracy import Line
from benchmarks.report import table

_RIVALS = ("torch", "torch.compile", "liger", "F.linear_cross_entropy", "bare products")


def show_accuracy(lines: Sequence[Line], machine: dict[str, Any], backend: str) -> None:
    """Print each line of the contract."""
    print(f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}, backend {backend}; errors against float64")
    rows = [
        (
            f"{line.kernel}: {line.what}",
            line.unit,
            f"{line.observed:.3g}",
            "-" if line.plain is None else f"{line.plain:.3g}",
            f"<= {line.contract:g}",
            "yes" if line.held else "BROKEN",
        )
        for line in lines
    ]
    print(table(("kernel: result", "unit", "argonne", "torch", "contract", "held"), rows))


def show(report: dict[str, Any]) -> None:
    """Print the tables of times, of the host's cost and of the targets."""
    machine, versions = report["environment"], report["identity"]
    records = _records(report)
    hosts = [case for case in report["cases"].values() if case not in records]
    told = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "liger-kernel") if versions[name])
    print(f"\n{machine.get('gpu', machine['cpu'])}, {told}; {report['dtype']}, medians of {report['rounds']} rounds")
    print("Rates against each other: more than 1 is faster. Eager: timed without a CUDA graph.")
    header = ("kernel", "tokens x widths", "direction", "/ clone", "GB/s", "us", "MB", *(f"x {r}" for r in _RIVALS))
    print(table(header, [_row(record) for record in records]))
    for name, reason in _absent(records):
        print(f"{name}: {reason}")
    print("\nHost, microseconds of an eager call")
    rows = [
        (h["kernel"], *(f"{h[f'{name}_us']:.1f}" for name in ("argonne", "torch", "target")), h["verdict"])
        for h in hosts
    ]
    print(table(("kernel", "argonne", "torch", "target, at most", ""), rows))
    print("\nTargets (of an H200, bfloat16, 8192 tokens or more)")
    rows = [
        (
            f"{record['kernel']} {record['direction']} {record['shape']}",
            target["name"],
            "-" if target["value"] is None else f"{target['value']:.2f}",
            f"{'<=' if target['name'].startswith('time') else '>='} {target['target']:g}",
            target["verdict"],
        )
        for record in records
        for target in record["targets"]
    ]
    print(table(("case", "ratio", "measured", "target", ""), rows) if rows else "none of this dtype and size")


def _records(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases that are no calls on the host."""
    return [case for case in report["cases"].values() if "contestants" in case]


def _row(record: dict[str, Any]) -> list[str]:
    found = record["contestants"]
    own = found["argonne"]
    cells = [record["kernel"], record["shape"], record["direction"]]
    cells += ["-", "-"] if own["of_clone"] is None else [f"{own['of_clone']:.2f}", f"{own['gb_per_s']:.0f}"]
    cells += [f"{own['median_us']:.1f}", f"{record['bytes'] / 1e6:.0f}"]
    for name in _RIVALS:
        rival = found.get(name)
        if not isinstance(rival, dict):
            cells.append("-")
            continue
        cells.append(f"{rival['median_us'] / own['median_us']:.2f}{' eager' if rival['timed'] == 'eager' else ''}")
    return cells


def _absent(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Who was not timed, and why, once each."""
    said = [
        (name, told if told.startswith("not ") else f"{record['kernel']}: {told}")
        for record in records
        for name, told in record["contestants"].items()
        if isinstance(told, str)
    ]
    return list(dict.fromkeys(said))


def plot_ratios(report: dict[str, Any], path: Path) -> bool:
    """Draw every contestant's rate over ``torch.clone``'s, case by case; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    machine = report["environment"]
    records = [r for r in _records(report) if r["contestants"]["argonne"]["of_clone"] is not None]
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(records)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, marker in (("argonne", "o"), ("torch.compile", "s"), ("liger", "^"), ("torch", "x")):
        points = [(r["contestants"][name]["of_clone"], y) for y, r in enumerate(records) if _timed(r, name)]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=name, markersize=5)
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    labels = [f"{r['kernel']} {r['direction']}, {r['shape']}" for r in records]
    axes.set_yticks(range(len(records)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("rate over that of torch.clone at as many bytes")
    axes.set_title(f"Kernels, {report['dtype']}, inputs not in L2: {machine.get('gpu', machine['cpu'])}", fontsize=10)
    axes.grid(alpha=0.3)
    if records:
        axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _timed(record: dict[str, Any], name: str) -> bool:
    return isinstance(record["contestants"].get(name), dict)
