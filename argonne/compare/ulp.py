"""How far apart two floating-point numbers are, as a whole number of steps between neighbours: exact, for any two.

An ulp (unit in the last place) is here the step from one number of a dtype to the next. The numbers of a dtype are
counted in their order, from minus to plus infinity, and two of them are as many ulp apart as their counts. The two
zeros have one count: 0 ulp lie between them, and yet their bits differ. NaN has no place in the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Those of which distances are known: their bits are a sign and then a magnitude that grows with the number."""

_CHUNK = 1 << 22  # elements that are compared at a time: what is made of each takes some 40 bytes


@dataclass(frozen=True)
class Difference:
    """Where the bits of two tensors of one shape and dtype are not the same."""

    count: int
    """Elements that differ."""
    first: tuple[int, ...]
    """The index of the first of them, row-major."""
    ulp: int | None
    """The largest distance; None where none is known: all of them have a NaN, or the dtype is not in ``DTYPES``."""
    nan: int
    """Elements that differ and are NaN on one side, or NaN of other bits."""

    @property
    def badness(self) -> tuple[int, int, int]:
        """In this order: those with NaN, the largest distance, how many there are."""
        return self.nan, -1 if self.ulp is None else self.ulp, self.count

    def told(self, one: Tensor, other: Tensor) -> str:
        """In words, with the first two values of the two tensors that differ."""
        values = " against ".join(repr(each[self.first].item()) for each in (one, other))
        facts = [f"{self.count:,} of {one.numel():,} elements differ, first at {list(self.first)} ({values})"]
        if self.ulp is not None:
            facts.append(f"by at most {distance_told(self.ulp, one.dtype)}")
        if self.nan:
            facts.append(f"{self.nan:,} with NaN")
        return ", ".join(facts)


def difference(one: Tensor, other: Tensor) -> Difference | None:
    """How two CPU tensors of one shape and dtype differ; None if they are equal bit for bit.

    A NaN equals another of the same bits, and -0.0 does not equal 0.0.
    """
    count, first, nan = 0, 0, 0
    ulp: int | None = None
    pairs = zip(*(torch.split(each.detach().reshape(-1), _CHUNK) for each in (one, other)), strict=True)
    for number, (a, b) in enumerate(pairs):
        places = torch.from_numpy(np.flatnonzero((_bytes(a) != _bytes(b)).any(axis=1)))
        if not len(places):
            continue
        if not count:
            first = number * _CHUNK + int(places[0])
        count += len(places)
        if one.dtype in DTYPES:
            a, b = a[places], b[places]
            numbers = ~(a.isnan() | b.isnan())
            nan += int((~numbers).sum())
            if numbers.any():
                ulp = max(ulp or 0, int(distances(a[numbers], b[numbers]).max()))
    if not count:
        return None
    return Difference(count, tuple(map(int, np.unravel_index(first, tuple(one.shape)))), ulp, nan)


def distances(one: Tensor, other: Tensor) -> NDArray[np.uint64]:
    """The ulp between each two elements, ``[elements]``, of two CPU tensors of one shape and one of ``DTYPES``.

    Of NaN they mean nothing.
    """
    a, b = _counts(one), _counts(other)
    return np.maximum(a, b) - np.minimum(a, b)


def distance(one: float, other: float, dtype: torch.dtype) -> int:
    """The ulp of ``dtype`` between two of its numbers."""
    return int(distances(torch.tensor([one], dtype=dtype), torch.tensor([other], dtype=dtype))[0])


def distance_told(ulp: int, dtype: torch.dtype) -> str:
    """The distance in words of two numbers whose bits differ."""
    unit = f"{ulp:,} ulp of {str(dtype).removeprefix('torch.')}"
    return unit if ulp else f"{unit} (zeros of other sign)"


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of each element of a flat tensor, ``[elements, bytes]``."""
    flat: NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).numpy()
    return flat.reshape(len(tensor), tensor.dtype.itemsize)


def _counts(tensor: Tensor) -> NDArray[np.uint64]:
    """The place of each number in the order of its dtype, counted so that both zeros are in the middle."""
    size = tensor.dtype.itemsize
    unsigned: NDArray[Any] = _bytes(tensor.detach().reshape(-1)).reshape(-1).view(f"u{size}")
    raw, middle = unsigned.astype(np.uint64), np.uint64(1 << (8 * size - 1))
    magnitude = raw & (middle - np.uint64(1))
    return np.where(raw & middle, middle - magnitude, middle + magnitude)
