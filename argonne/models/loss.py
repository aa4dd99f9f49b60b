"""The loss of pretraining: cross-entropy of the next token, from hidden values, without logits that exist whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from argonne.kernels import Backend, linear_cross_entropy
from argonne.models.contract import Batch, Head
from argonne.parallel import Objective


@dataclass(frozen=True)
class CrossEntropyLoss:
    """The summed cross-entropy in nats, each position weighted as the batch says; a ``LossFunction``."""

    objective: Objective = Objective()  # noqa: RUF009 - frozen
    """Label smoothing, z-loss and the target that is ignored."""
    kernels: Backend = "auto"
    parts: list[Tensor] | None = None
    """Is given, at each call, the sums ``[objective.parts]`` of which the loss is the sum; None costs nothing."""

    def __call__(self, hidden: Tensor, head: Head, batch: Batch) -> Tensor:
        of_positions: list[Tensor] | None = None if self.parts is None else []
        if batch.weights is None:
            loss = self._losses(hidden, head, batch, "sum", of_positions)
        else:
            losses = self._losses(hidden, head, batch, "none", of_positions).view(batch.targets.shape)
            loss = (losses * batch.weights.to(losses.dtype)).sum()
        if self.parts is not None and of_positions:
            found = torch.cat(of_positions, 1)
            weights = 1 if batch.weights is None else batch.weights.flatten().to(found.dtype)
            self.parts.append((found * weights).sum(1))
        return loss

    def of_each_position(self, hidden: Tensor, head: Head, batch: Batch) -> Tensor:
        """The loss of each position ``[batch, positions]``, not weighted."""
        return self._losses(hidden, head, batch, "none").view(batch.targets.shape)

    def _losses(
        self,
        hidden: Tensor,
        head: Head,
        batch: Batch,
        reduction: Literal["sum", "none"],
        parts: list[Tensor] | None = None,
    ) -> Tensor:
        targets, objective = batch.targets.flatten(), self.objective
        return linear_cross_entropy(hidden, head, targets, objective, reduction, backend=self.kernels, parts=parts)
