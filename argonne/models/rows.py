"""What lies between the products of a decoder's block, of one position of each row, in NumPy and in few operations.

A CPU multiplies one row by a layer's weights in some hundred microseconds, which push all else out of its caches. From
there an operation of PyTorch costs 3 to 5 microseconds however little it computes, one of NumPy a third of that, and
sixty of them in a layer would take as long as the products (docs/log.md). The values are those of ``argonne.kernels``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from argonne.parallel import Precision
from argonne.parallel.tensor_parallel.gemm import Array


def suits_rows(precision: Precision) -> bool:
    """Whether NumPy has these dtypes, and a weight needs no other than its own."""
    return precision.parameters == precision.compute and precision.compute in (torch.float32, torch.float64)


def normed(x: Array, weight: Array, eps: float) -> Array:
    """``kernels.rms_norm`` of ``[..., features]``."""
    if len(x) == 1 and x.ndim == 2:  # which is what is computed most
        y = x * (float(np.dot(x[0], x[0])) / x.shape[1] + eps) ** -0.5
    else:
        size: Array = np.add.reduce(x * x, axis=-1, keepdims=True)
        size *= 1 / x.shape[-1]
        size += eps
        y = x / np.sqrt(size, out=size)
    y *= weight
    return y


def gated(x: Array) -> Array:
    """``kernels.swiglu`` of packed ``[rows, 2 * columns]``."""
    columns = x.shape[-1] // 2
    gate = x[:, :columns]
    y = np.exp(-gate)
    y += 1
    np.divide(gate, y, out=y)
    y *= x[:, columns:]
    return y


def whole_tables(cos: Array, sin: Array) -> tuple[Array, Array]:
    """``[rows, head_dim / 2]`` cosines and sines as ``turned`` takes them: ``[rows, 1, 2, head_dim / 2]``."""
    return np.stack((cos, cos), 1)[:, None], np.stack((-sin, sin), 1)[:, None]


def turned(x: Array, cos: Array, sin: Array) -> Array:
    """``kernels.apply_rope`` of ``[rows, heads, head_dim]``, each row at its position of the ``whole_tables``."""
    halves = x.reshape(*x.shape[:-1], 2, -1)
    y = halves * cos
    y += halves[..., ::-1, :] * sin
    return y.reshape(x.shape)


def attended(query: Array, keys: Array, values: Array, askers: Sequence[slice]) -> Array:
    """Attention of one position: queries ``[heads, dim]`` to ``[kv heads, seen, dim]``; the shape of ``query``.

    ``askers`` are the query heads of each key-value head.
    """
    scores = np.empty((len(query), keys.shape[1]), query.dtype)
    for own, head in zip(askers, keys, strict=True):
        np.dot(query[own], head.T, out=scores[own])
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    scores *= query.shape[-1] ** -0.5
    np.exp(scores, out=scores)
    scores /= np.add.reduce(scores, axis=-1, keepdims=True)
    context = np.empty_like(query)
    for own, head in zip(askers, values, strict=True):
        np.dot(scores[own], head, out=context[own])
    return context
