"""Which library multiplies: MKL keeps its fast float32 kernels to Intel's CPUs, oneDNN and OpenBLAS do not.

Measured on an AMD EPYC with AVX-512, one thread, 2,048 tokens of 256 features (docs/log.md): 92 GFLOP/s through
``F.linear``, 228 through oneDNN. Everywhere else, and without gradients, PyTorch's own choice stands.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[Any]
"""What NumPy computes with, where a call of PyTorch would take longer than what it computes."""


_NARROW = 1024
"""Columns of so many features OpenBLAS reads with 15 GB a second on the CPU above, with 20 and more if they are longer.
NumPy's own loop, which goes through all as through one, has 19."""


def suits_onednn(x: Tensor) -> bool:
    """Whether products with ``x`` are faster in oneDNN. ``torch.backends.mkldnn.set_flags(False)`` says never."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and bool(torch.backends.mkldnn.enabled)
        and _mkl_is_slow_here()
    )


def stays_ours(x: Tensor) -> bool:
    """Whether ``torch.compile`` is not to look into products with ``x``, lest it have MKL make what oneDNN is to."""
    return torch.compiler.is_compiling() and x.dtype == torch.float32 and x.device.type == "cpu"


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b^T + bias`` of ``[..., k]``, ``[n, k]`` and ``[n]``, without autograd."""
    if stays_ours(a):
        found: Tensor = torch.ops.argonne.product(a, b, bias)
        return found
    if suits_onednn(a) and a.numel() and b.numel():
        rows = torch.ops.mkldnn._linear_pointwise(as_matrix(a), b, bias, "none", [], "")
        return rows.view(*a.shape[:-1], b.shape[0])
    return F.linear(a, b, bias)


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """``a^T @ b`` of ``[k, m]`` and ``[k, n]``, without autograd; contiguous.

    oneDNN copies the first factor of a product, so that the smaller one is first here where that saves more than the
    result, which then has to be turned.
    """
    if stays_ours(a):
        found: Tensor = torch.ops.argonne.transposed_product(a, b)
        return found
    (k, m), n = a.shape, b.shape[1]
    if suits_onednn(a) and k * (m - n) > m * n:
        return product(b.t(), a.t()).t().contiguous()
    return product(a.t(), b.t())


def product_of_rows(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``product`` on a CPU without gradients, and of a single row as ``lay_out_for_rows`` has prepared it.

    Such a product is one pass over the weight, of which OpenBLAS makes 16 to 25 GB a second, MKL 11 to 22.
    """
    if a.numel() != a.shape[-1]:
        return product(a, b, bias)
    if a.dtype != torch.float32 or a.dim() > 2 or torch.compiler.is_compiling() or not _openblas_is_ready():
        return F.linear(a, b, bias)
    y = torch.from_numpy(np.dot(a.numpy(), b.numpy().T))
    return y if bias is None else y.add_(bias)


def prepared_for_rows(b: Tensor, bias: Tensor | None = None) -> Callable[[Array], Array]:
    """``product_of_rows`` of ``[rows, k]`` by a weight that stays where it is: what need not be asked for each row."""
    table, added = b.numpy().T, None if bias is None else bias.numpy()
    is_ready = b.dtype == torch.float32 and _openblas_is_ready()
    is_narrow = lies_for_rows(b) and len(b) <= _NARROW

    def multiply(a: Array) -> Array:
        if not is_ready or len(a) != 1:
            return product_of_rows(torch.from_numpy(a), b, bias).numpy()
        y: Array = np.einsum("k,kn->n", a[0], table)[None] if is_narrow else np.dot(a, table)
        if added is not None:
            y += added
        return y

    return multiply


def lies_for_rows(weight: Tensor) -> bool:
    """Whether it was laid out so."""
    return weight.stride(0) == 1 and weight.shape[0] > 1 and weight.is_cpu


def lay_out_for_rows(weight: Tensor) -> None:
    """Put a weight ``[out, in]`` into memory column after column, where products of a single row are faster with that.

    The values and all products stay what they are. Measured on the CPU above, one row, float32: 342 against 657
    microseconds for ``[3072, 576]``, 5.6 against 10.3 milliseconds for ``[49152, 576]``, and never much slower.
    """
    if weight.dim() == 2 and suits_onednn(weight):
        weight.data = weight.data.t().contiguous().t()


def as_matrix(x: Tensor) -> Tensor:
    """``[..., features]`` -> ``[rows, features]``; unlike ``reshape(-1, ...)`` also for a rank without features."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _openblas_is_ready() -> bool:
    """Whether it is the better one, and has one thread as PyTorch has: two crowds of threads disturb each other."""
    return torch.get_num_threads() == 1 and _openblas_has_one_thread()


@cache
def _openblas_has_one_thread() -> bool:
    library = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    one = os.environ.get("OMP_NUM_THREADS") == "1"  # which it has read when numpy was imported
    return _mkl_is_slow_here() and one and "openblas" in library


@cache
def _mkl_is_slow_here() -> bool:
    """An x86-64 CPU of another maker than Intel, and a PyTorch that has both libraries."""
    cpuinfo = Path("/proc/cpuinfo")
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and cpuinfo.exists()):
        return False
    makers = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("vendor_id")]
    return bool(makers) and "GenuineIntel" not in makers[0] and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_LIBRARY = torch.library.Library("argonne", "FRAGMENT")
_LIBRARY.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")
_LIBRARY.impl("product", product, "CPU")
_LIBRARY.define("transposed_product(Tensor a, Tensor b) -> Tensor")
_LIBRARY.impl("transposed_product", transposed_product, "CPU")


@torch.library.register_fake("argonne::product", lib=_LIBRARY)
def _product_shape(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[0])


@torch.library.register_fake("argonne::transposed_product", lib=_LIBRARY)
def _transposed_product_shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], b.shape[1])
