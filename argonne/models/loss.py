"""The loss of pretraining: cross-entropy of the next token, from hidden values or from logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from argonne.kernels import Backend, cross_entropy, linear_cross_entropy
from argonne.models.contract import Batch, Head
from argonne.parallel import Objective


@dataclass(frozen=True)
class CrossEntropyLoss:
    """The summed cross-entropy in nats, each position weighted as the batch says; a ``LossFunction``.

    Of hidden values, whose logits then never exist whole.
    """

    objective: Objective = Objective()  # noqa: RUF009 - frozen
    """Label smoothing, z-loss and the target that is ignored."""
    kernels: Backend = "auto"
    parts: list[Tensor] | None = None
    """Is given, at each call, the sums ``[objective.parts]`` of which the loss is the sum; None costs nothing."""

    def __call__(self, hidden: Tensor, head: Head, batch: Batch) -> Tensor:
        def losses(reduction: Literal["sum", "none"], parts: list[Tensor] | None) -> Tensor:
            return self._losses(hidden, head, batch, reduction, parts)

        return self._total(losses, batch)

    def of_logits(self, logits: Tensor, head: Head, batch: Batch) -> Tensor:
        """The same of logits ``[rows, this rank's tokens]`` that exist, of a model that changes them (caps them, say).

        They are made as ``argonne.parallel.vocab_parallel_logits`` makes those of ``head``: of all of the rows.
        """

        def losses(reduction: Literal["sum", "none"], parts: list[Tensor] | None) -> Tensor:
            found = cross_entropy(
                logits,
                batch.targets.flatten(),
                self.objective,
                vocabulary=head.range,
                axis=head.axis,
                backend=self.kernels,
                parts=parts,
            )
            return found.sum() if reduction == "sum" else found

        return self._total(losses, batch)

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

    def _total(self, losses: Callable[[Literal["sum", "none"], list[Tensor] | None], Tensor], batch: Batch) -> Tensor:
        """The sum of what ``losses`` gives, weighted, and its parts."""
        found: list[Tensor] | None = None if self.parts is None else []
        if batch.weights is None:
            total = losses("sum", found)
        else:
            each = losses("none", found).view(batch.targets.shape)
            total = (each * batch.weights.to(each.dtype)).sum()
        if self.parts is not None:
            for parts in found or ():
                weights = 1 if batch.weights is None else batch.weights.flatten().to(parts.dtype)
                self.parts.append((parts * weights).sum(1))
        return total
