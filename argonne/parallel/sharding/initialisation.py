"""Initial values that depend on the seed, the whole tensor's name and the element's place: on no layout.

The generator is counter-based (Philox, Salmon et al. 2011): element *i* of a tensor is a pure function of
*i*, so a rank computes exactly the part it holds. Values are made on the CPU whatever the device, so that
a GPU run begins with the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements made at a time: bounds the float64 scratch at 32 MiB


class Initialiser(Protocol):
    """How a whole tensor begins."""

    def fill(self, part: Tensor, seed: int, name: str, whole_shape: Sequence[int], start: Sequence[int]) -> None:
        """Overwrite ``part`` with the box of whole tensor ``name`` that begins at ``start``."""


@dataclass(frozen=True)
class Constant:
    """Every element is ``value``."""

    value: float

    def fill(self, part: Tensor, seed: int, name: str, whole_shape: Sequence[int], start: Sequence[int]) -> None:
        part.fill_(self.value)


@dataclass(frozen=True)
class Normal:
    """Independent draws from a normal distribution of mean 0 and standard deviation ``std``."""

    std: float

    def fill(self, part: Tensor, seed: int, name: str, whole_shape: Sequence[int], start: Sequence[int]) -> None:
        key = key_of(seed, name)
        # Whole trailing dimensions are contiguous in the whole tensor, and are drawn in one stretch.
        first_whole = part.dim()
        while first_whole > 1 and part.shape[first_whole - 1] == whole_shape[first_whole - 1]:
            first_whole -= 1
        strides = [math.prod(whole_shape[d + 1 :]) for d in range(part.dim())]
        stretch = math.prod(part.shape[max(first_whole - 1, 0) :])
        for outer in np.ndindex(*part.shape[: max(first_whole - 1, 0)]):
            index = [*outer, *[0] * (part.dim() - len(outer))]
            begin = sum((s + i) * stride for s, i, stride in zip(start, index, strides, strict=True))
            flat = np.empty(stretch, dtype=np.float32)
            for at in range(0, stretch, _CHUNK):
                flat[at : at + _CHUNK] = _normal(key, begin + at, min(_CHUNK, stretch - at))
            values = torch.from_numpy(flat).mul_(self.std)
            part[tuple(outer)].copy_(values.view(part.shape[len(outer) :]))


def key_of(seed: int, name: str) -> int:
    """128 bits that seed and name decide."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")


def _normal(key: int, start: int, count: int) -> np.ndarray:
    """Elements ``start .. start+count`` of the key's normal sequence, by Box-Muller on one word each."""
    words_per_counter = 4
    generator = np.random.Philox(key=key, counter=start // words_per_counter)
    words = generator.random_raw(start % words_per_counter + count)[start % words_per_counter :]
    # 32 bits each for the radius (never 0, so the logarithm is finite) and the angle.
    radius = np.sqrt(-2.0 * np.log(((words >> np.uint64(32)) + 1.0) * 2.0**-32))
    angle = (words & np.uint64(0xFFFFFFFF)) * (2.0 * math.pi * 2.0**-32)
    return (radius * np.cos(angle)).astype(np.float32)
