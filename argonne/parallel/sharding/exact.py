"""A sum of squares that is the same however its terms are shared out: none of its additions rounds.

Each square is cut at bits that are multiples of one unit (Rump, Ogita and Oishi 2008; Demmel and Nguyen 2013): so wide
that the sum of all leading parts fits a float64. What is left is cut again, until more bits are counted than float64
has. The units follow from the largest term and the number of terms, which no order changes either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from argonne.parallel.communication.collectives import all_gather
from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.reduction import sum_over
from argonne.parallel.sizes_only import turns

_BITS = 53  # of a float64
_COUNTED = 64  # bits of the largest square below which nothing is counted
_CHUNK = 1 << 18  # elements in float64 at a time: in a CPU's cache


def exact_square_sum(parts: Iterable[Tensor], axis: Axis, device: torch.device) -> Tensor:
    """The sum of the squares of all elements that the ranks of ``axis`` have, none twice: float64, equal on all.

    It is not finite where an element is not.
    """
    parts = [part for part in parts if part.numel()]
    largest = [part.abs().max().double() for part in parts] or [torch.zeros((), dtype=torch.float64, device=device)]
    count = torch.tensor(float(sum(part.numel() for part in parts)), dtype=torch.float64, device=device)
    known = all_gather(torch.stack((torch.stack(largest).max(), count)), axis)
    top, terms = float(known[:, 0].max()), int(known[:, 1].sum())
    if not math.isfinite(top) or top == 0 or bool(known.isnan().any()):
        return torch.tensor(math.nan if known.isnan().any() else top, dtype=torch.float64, device=device)
    units = _units(top, terms)
    found = torch.zeros(len(units), dtype=torch.float64, device=device)
    for part in parts:
        for piece in turns(part.reshape(-1).split(_CHUNK)):
            rest = piece.double().square()
            for number, unit in enumerate(units):
                leading = (rest + unit).sub_(unit)
                found[number] += leading.sum()
                rest.sub_(leading)
    sums = sum_over(found, axis).tolist()
    return torch.tensor(math.fsum(sums), dtype=torch.float64, device=device)


def _units(top: float, terms: int) -> list[float]:
    """To whose last bit squares are cut, one after the other: ``terms`` times the largest part stays below each."""
    spread = max(1, terms).bit_length()
    exponent = 2 * math.frexp(top)[1] + spread
    each = _BITS - 1 - spread  # bits that a cut takes from the largest term
    return [math.ldexp(1.0, exponent - number * each) for number in range(-(-_COUNTED // each))]
