"""The loss of pretraining: cross-entropy of the next token, from hidden values, without logits that exist whole."""

from __future__ import annotations

from dataclasses import dataclass

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

    def __call__(self, hidden: Tensor, head: Head, batch: Batch) -> Tensor:
        if batch.weights is None:
            targets = batch.targets.flatten()
            return linear_cross_entropy(hidden, head, targets, self.objective, "sum", backend=self.kernels)
        losses = self.of_each_position(hidden, head, batch)
        return (losses * batch.weights.to(losses.dtype)).sum()

    def of_each_position(self, hidden: Tensor, head: Head, batch: Batch) -> Tensor:
        """The loss of each position ``[batch, positions]``, not weighted."""
        targets = batch.targets
        losses = linear_cross_entropy(hidden, head, targets.flatten(), self.objective, "none", backend=self.kernels)
        return losses.view(targets.shape)
