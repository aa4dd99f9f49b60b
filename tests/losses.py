"""The loss of a model on ids and targets, with gradients, as the tests that hold it against a reference want it."""

from __future__ import annotations

from torch import Tensor

from argonne.models import ArgonneModel, Batch, CrossEntropyLoss
from argonne.parallel import Objective


def summed_loss(
    model: ArgonneModel,
    ids: Tensor,
    targets: Tensor,
    documents: Tensor | None = None,
    loss: CrossEntropyLoss = CrossEntropyLoss(),
) -> Tensor:
    """What ``model.forward_backward`` goes back from: the sum over this rank's positions of ``[batch, sequence]``."""
    batch = Batch(ids, targets, documents)
    return loss(model(batch), model.head, batch.shard(model.groups.context))


def losses(
    model: ArgonneModel,
    ids: Tensor,
    targets: Tensor,
    documents: Tensor | None = None,
    objective: Objective = Objective(),
) -> Tensor:
    """The loss of each of this rank's positions ``[batch, positions]``."""
    batch = Batch(ids, targets, documents)
    return CrossEntropyLoss(objective).of_each_position(model(batch), model.head, batch.shard(model.groups.context))
