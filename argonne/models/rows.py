"""What lies between the products of a decoder's block, of one position of each row, in NumPy and in few operations.

A CPU multiplies one row by a layer's weights in some hundred microseconds, which push all else out of its caches. From
there an operation of PyTorch costs 3 to 5 microseconds however little it computes, one of NumPy a third of that, and
sixty of them in a layer would take as long as the products (docs/log.md). The values are those of ``argonne.kernels``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from argonne.models.cache import CachePass, LayerCache
from argonne.models.execution import Execution
from argonne.parallel.tensor_parallel.gemm import Array


def suits_rows(execution: Execution) -> bool:
    """Whether blocks have this way: in fast mode on a CPU, where NumPy has the dtype, and weights have no other."""
    groups, precision = execution.groups, execution.precision
    if groups.device.type != "cpu" or groups.sequence_parallel or groups.reproducible:
        return False
    return precision.parameters == precision.compute and precision.compute in (torch.float32, torch.float64)


def normed(x: Array, weight: Array, eps: float) -> Array:
    """``kernels.rms_norm`` of ``[..., features]``."""
    if len(x) == 1 and x.ndim == 2:  # which is what is computed most
        y = x / sqrt(np.dot(x[0], x[0]) / x.shape[1] + eps)
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


def attending(
    keys: Tensor, values: Tensor, used: Sequence[int], regular: bool
) -> Callable[[CachePass, Array, Array], Array]:
    """``LayerCache.attend_rows`` in NumPy, of what a cache has of one layer; keys are behind their queries.

    ``used`` is the key-value head of each query head, ``regular`` where it is that of runs of equally many.
    """
    own_keys, own_values = keys.numpy()[0], values.numpy()[0]
    askers = [slice(bisect_left(used, head), bisect_right(used, head)) for head in range(len(own_keys))]

    def attend(cached: CachePass, both: Array, value: Array) -> Array:
        query, key = both[:, : len(used)], both[:, len(used) :]
        if cached.rows > 1:
            asked, *new = (torch.from_numpy(each) for each in (query, key, value))
            layer = LayerCache(cached, keys, values)
            return layer.attend_rows(asked, new[0], new[1], None if regular else used).numpy()
        seen = cached.seen
        own_keys[:, seen - 1], own_values[:, seen - 1] = key[0], value[0]
        return attended(query[0], own_keys[:, :seen], own_values[:, :seen], askers)

    return attend
