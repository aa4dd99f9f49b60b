"""Hashes of whole tensors, of which each rank has a part: the sum over the ranks depends on no layout.

An element's bits and its place in the whole tensor are mixed to 64 bits, and these are added up modulo 2^64: in no
order, and exactly. A place that is off by one, two elements that changed places and a bit that differs are each seen
but for a chance of some 2^-64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}  # elements that are mixed at a time; what is made of each takes 16 bytes
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _signed(word: int) -> int:
    """The int64 of these 64 bits."""
    return word - (1 << 64) if word >> 63 else word


_OF_BITS, _OF_PLACE = _signed(0xD6E8FEB86659FD93), _signed(0x9E3779B97F4A7C15)  # odd, and unlike each other
_FIRST, _SECOND = _signed(0xFF51AFD7ED558CCD), _signed(0xC4CEB9FE1A85EC53)  # MurmurHash3's finaliser (Appleby 2011)
_HIGH = (1 << 31) - 1


@torch.no_grad()
def hash_of_part(part: Tensor, places: Sequence[Tensor], whole_shape: Sequence[int]) -> Tensor:
    """What a part of a whole tensor adds to its hash: an int64 scalar on the part's device.

    Args:
        part: of any dtype and strides.
        places: for each dimension, where in the whole tensor the part's indices along it are: int64 ``[extent]``.
        whole_shape: that of the whole tensor; how long its first dimension is does not count.
    """
    if part.dim() == 0:
        part, places, whole_shape = part.view(1), [torch.zeros(1, dtype=torch.int64, device=part.device)], (1,)
    strides = [math.prod(whole_shape[dim + 1 :]) for dim in range(part.dim())]
    inner = torch.zeros((), dtype=torch.int64, device=part.device)
    for place, stride in zip(places[1:], strides[1:], strict=True):
        inner = inner.unsqueeze(-1) + place.to(part.device) * stride
    rows, inner = places[0].to(part.device) * strides[0] * _OF_PLACE, inner.reshape(1, -1) * _OF_PLACE
    bits = part.detach().view(_INTEGERS[part.dtype.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    count = max(1, _CHUNK.get(part.device.type, 1 << 24) // max(1, inner.numel()))
    for some, row in zip(bits.split(count), rows.split(count), strict=True):
        words = some.reshape(len(some), -1).to(torch.int64) * _OF_BITS
        total += _mixed(words.add_(row.unsqueeze(1)).add_(inner)).sum()
    return total


def hash_of_box(part: Tensor, start: Sequence[int], whole_shape: Sequence[int]) -> Tensor:
    """``hash_of_part`` of the box that begins at ``start``."""
    places = [torch.arange(first, first + extent) for first, extent in zip(start, part.shape, strict=True)]
    return hash_of_part(part, places, whole_shape)


def as_copy(found: Tensor, copy: int, copies: int) -> Tensor:
    """What copy number ``copy`` of a part adds to the hash.

    Together that is the part's hash where all copies have the same, and another where one has not.
    """
    return found * (2 if copy else 3 - 2 * copies)


def _mixed(words: Tensor) -> Tensor:
    """Each word so that each of its bits depends on all that it had; in place."""
    for factor in (_FIRST, _SECOND):
        words.bitwise_xor_((words >> 33).bitwise_and_(_HIGH)).mul_(factor)
    return words.bitwise_xor_((words >> 33).bitwise_and_(_HIGH))
