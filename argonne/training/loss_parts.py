"""What the loss of a step is made of, where it is more than the cross-entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from argonne.parallel import Distillation, Objective, ProcessGroups
from argonne.parallel.communication.reduction import sum_over

ROUNDING = 1e-4
"""How far the parts may be from adding up to the loss, beside their size: what float32 leaves of long sums."""


class LossParts:
    """The parts of the losses of a step's micro-batches, added up as the losses are. Without parts it costs nothing.

    Args:
        objective: what is minimised.
        groups: the processes.
        dtype: of the losses.
    """

    def __init__(self, objective: Objective | Distillation, groups: ProcessGroups, dtype: torch.dtype) -> None:
        self.names, self.weights, self.groups, self.dtype = objective.parts, objective.weights, groups, dtype
        self.found: list[Tensor] | None = [] if self.names else None
        """What ``CrossEntropyLoss.parts`` is given: nothing on ranks that compute no loss."""

    def take(self, targets: int, loss: float) -> dict[str, float]:
        """The mean of each part over the targets of the global batch, the same on every rank; then forgotten.

        Collective. In float64, in which so few numbers of 24 bits add up without rounding: in any order. Nothing is
        told where they do not add up to the ``loss``, of which the model has then made something else: it has
        computed it in its own way, or weighted several.
        """
        if self.found is None:
            return {}
        total = torch.zeros(len(self.names), dtype=torch.float64, device=self.groups.device)
        for part in self.found:
            total += part
        self.found.clear()
        for axis in (self.groups.pipeline, self.groups.replicas):
            total = sum_over(total, axis)
        means = (total / targets).to(self.dtype).tolist()
        weighted = [weight * mean for weight, mean in zip(self.weights, means, strict=True)]
        if abs(math.fsum(weighted) - loss) > ROUNDING * math.fsum(map(abs, weighted)):
            return {}
        return dict(zip(self.names, means, strict=True))
