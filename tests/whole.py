"""Whole tensors from the parts that ranks hold, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from argonne.parallel import ProcessGroups, Region, sharded_parameters

Parts = list[tuple[Region, Tensor]]


def parts_of(model: nn.Module, groups: ProcessGroups, value: Callable[[nn.Parameter], Tensor]) -> Parts:
    """Each region of each parameter with that part of ``value(parameter)``: what a rank sends back."""
    return [
        (region, value(sharded.parameter).detach()[region.local_index].clone())
        for sharded in sharded_parameters(model, groups)
        for region in sharded.spec.regions
    ]


def assemble(ranks: Iterable[Parts]) -> dict[str, Tensor]:
    """The whole tensors; parts that several ranks hold must be equal to the bit, and no element missing."""
    wholes: dict[str, Tensor] = {}
    covered: dict[str, Tensor] = {}
    for rank, parts in enumerate(ranks):
        for region, part in parts:
            whole = wholes.setdefault(region.name, torch.zeros(region.whole_shape, dtype=part.dtype))
            seen = covered.setdefault(region.name, torch.zeros(region.whole_shape, dtype=torch.bool))
            overlap = seen[region.whole_index]
            assert torch.equal(whole[region.whole_index][overlap], part[overlap]), (
                f"rank {rank} holds other values of {region.name} than the ranks before it"
            )
            whole[region.whole_index] = part
            seen[region.whole_index] = True
    for name, seen in covered.items():
        assert seen.all(), f"no rank holds {int((~seen).sum())} elements of {name}"
    return wholes


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str, scale: float = 0.0) -> None:
    """Relative error in the 2-norm; ``scale`` is the size below which a value counts as rounding of zero."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)} is not {tuple(expected.shape)}"
    error = torch.linalg.vector_norm((found - expected).double()).item()
    size = max(torch.linalg.vector_norm(expected.double()).item(), scale)
    assert error <= tolerance * size, f"{what}: off by {error:.3e} in {size:.3e}, more than {tolerance:.0e}"
