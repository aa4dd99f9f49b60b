"""What one rank has to save or to load: parts of whole tensors, under the names that a checkpoint gives them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from argonne.parallel import ArgonneError, Region, ShardedParameter, regions_of

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam and AdamW keep for each element of a parameter."""
MUON_MOMENT = "momentum_buffer"
"""What Muon keeps of a matrix."""


@dataclass(frozen=True)
class Piece:
    """This rank's part of a whole tensor that is saved, or was, under ``name``."""

    name: str
    region: Region
    part: Tensor


def weight_pieces(parameters: Iterable[ShardedParameter]) -> list[Piece]:
    """This rank's parts of the weights, named as the whole tensors are."""
    return [Piece(region.name, region, part) for region, part in regions_of(list(parameters))]


class KeepsMoments(Protocol):
    """An optimizer, as far as checkpoints know one."""

    @property
    def state(self) -> MutableMapping[Tensor, Any]:
        """What it keeps of each parameter, by name."""


def moment_pieces(
    optimizer: KeepsMoments, parameters: Sequence[ShardedParameter], moments: Sequence[str] = MOMENTS
) -> list[Piece]:
    """This rank's parts of the optimizer's moments, named ``<whole tensor>.exp_avg`` and ``<whole tensor>.exp_avg_sq``.

    Args:
        optimizer: any that keeps tensors of a parameter's shape in ``optimizer.state[parameter]``.
        moments: what it calls these tensors.

    Raises:
        ArgonneError: the optimizer keeps nothing of that name for a parameter; before its first step it keeps
            nothing at all, and ``reset_moments`` begins what AdamW keeps.
    """
    found = []
    for sharded in parameters:
        state = optimizer.state.get(sharded.parameter, {})
        if missing := [moment for moment in moments if moment not in state]:
            raise ArgonneError(f"the optimizer keeps no {missing[0]!r} of {sharded.name!r}; legal: {sorted(state)}")
        found += [
            Piece(f"{region.name}.{moment}", region, region.part_of(state[moment]))
            for region in sharded.spec.regions
            if 0 not in region.shape
            for moment in moments
        ]
    return found


def reset_moments(
    optimizer: KeepsMoments, parameters: Sequence[ShardedParameter], step: int = 0, moments: Sequence[str] = MOMENTS
) -> None:
    """Begin the moments, AdamW's by default, at zero, as after ``step`` optimizer steps."""
    for sharded in parameters:
        parameter = sharded.parameter
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),
            **{moment: torch.zeros_like(parameter) for moment in moments},
        }
