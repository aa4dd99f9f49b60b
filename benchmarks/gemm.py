"""MKL or oneDNN: float32 products of a training step on this CPU, one thread. ``python benchmarks/gemm.py``

The three products of a linear layer (output, input gradient, weight gradient), as ``F.linear`` and autograd make
them and as ``argonne.parallel.tensor_parallel.gemm`` would have oneDNN make them. The best of many runs counts:
others on the machine only ever make a product slower.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script

from benchmarks.report import environment, table, write_json

SHAPES = ((2048, 256, 256), (2048, 128, 256), (2048, 256, 768), (2048, 384, 256), (256, 256, 4096))
"""Tokens, input and output features: a rank's layers in ``tp_peers``, and a chunk of its head."""
RUNS = 40


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T``, whatever this CPU would be better off with."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def rate(product: Callable[[], Tensor], flops: float) -> float:
    """GFLOP/s of the fastest of ``RUNS`` calls."""
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - began)
    return flops / min(seconds) / 1e9


def measure(tokens: int, inputs: int, outputs: int) -> dict[str, float]:
    """The rates of the six products of one layer."""
    x, weight, gradient = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
    products: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "output": (lambda: x @ weight.t(), lambda: onednn(x, weight)),
        "input gradient": (lambda: gradient @ weight, lambda: onednn(gradient, weight.t())),
        "weight gradient": (lambda: gradient.t() @ x, lambda: onednn(gradient.t(), x.t())),
    }
    found = {}
    for name, (usual, other) in products.items():
        torch.testing.assert_close(usual(), other(), rtol=1e-3, atol=1e-2)
        found[name] = rate(usual, 2 * tokens * inputs * outputs)
        found[f"{name}, oneDNN"] = rate(other, 2 * tokens * inputs * outputs)
    return found


def main() -> None:
    """Measure, print the table, write the JSON."""
    torch.set_num_threads(1)
    machine = environment(torch.device("cpu"))
    found = {shape: measure(*shape) for shape in SHAPES}
    names = ("output", "input gradient", "weight gradient")
    rows = [
        (f"{t} x {i} -> {o}", *(f"{own[n]:.0f} / {own[f'{n}, oneDNN']:.0f}" for n in names))
        for (t, i, o), own in found.items()
    ]
    print(f"{machine['cpu']}, torch {machine['torch']}, one thread; GFLOP/s, torch.mm / oneDNN")
    print(table(("tokens x in -> out", *names), rows))
    output = Path(__file__).parent / "results" / "gemm_cpu.json"
    write_json(output, {"environment": machine, "gflops": {"x".join(map(str, s)): own for s, own in found.items()}})
    print(f"written: {output}")


if __name__ == "__main__":
    main()
