"""One optimizer step, from a batch to new weights: what training, the tests of every layout and any driver call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch

from argonne.models import Batch, LanguageModel, LossFunction
from argonne.parallel import (
    ArgonneError,
    DataParallel,
    ShardedParameter,
    clip_gradients,
    global_gradient_norm,
    initialise,
)
from argonne.parallel.communication.reduction import sum_over
from argonne.training.loss_scale import LossScale
from argonne.training.optimizer import Optimizer, set_learning_rate


@dataclass(kw_only=True)
class Learner:
    """What a step reads and changes, on one rank."""

    model: LanguageModel
    replicas: DataParallel
    optimizer: Optimizer
    loss_scale: LossScale = field(default_factory=LossScale)
    step: int = 0
    """Optimizer steps taken."""

    @property
    def parameters(self) -> list[ShardedParameter]:
        """What this rank updates and saves."""
        return self.replicas.parameters

    def initialise(self, seed: int) -> None:
        """Begin with the weights of that seed."""
        initialise(self.parameters, seed)
        self.replicas.publish()


class StepResult(NamedTuple):
    """What a step tells, the same on every rank."""

    loss: float
    """The mean over the targets of the global batch, before the step."""
    norm: float | None
    """The gradient's, before clipping; None when it overflowed in float16 and no optimizer step was taken."""


class NotFinite(ArgonneError):
    """A loss or gradient norm that is no number to train on; raised on every rank alike."""


class StepObserver(Protocol):
    """What looks on while a step is taken, and changes nothing."""

    def gradients(self, parameters: Sequence[ShardedParameter]) -> None:
        """The gradients are complete, and not clipped yet."""

    def weights(self, parameters: Sequence[ShardedParameter]) -> None:
        """The weights are those after the step."""


def train_step(
    learner: Learner,
    batch: Batch,
    loss: LossFunction,
    learning_rate: float,
    gradient_clip: float,
    observer: StepObserver | None = None,
) -> StepResult:
    """Take one optimizer step (collective over all ranks).

    ``batch`` has this rank's micro-batches; its divisor is the number of target tokens of the global batch.
    ``gradient_clip`` is the largest global gradient norm.

    Raises:
        NotFinite: on every rank alike, a loss or norm that is not finite; the weights are as before.
    """
    total = _forward_backward(learner, batch, loss)
    norm = _update(learner, learning_rate, gradient_clip, observer)
    if observer is not None:
        observer.weights(learner.parameters)
    learner.step += 1
    return StepResult(total, norm)


def _forward_backward(learner: Learner, batch: Batch, loss: LossFunction) -> float:
    """This rank's part of the gradients, under the loss scale; the loss of the global batch."""
    model, scale = learner.model, learner.loss_scale.scale
    learner.replicas.begin(len(batch.ids), deferred=model.defers_weight_gradients)
    own = model.forward_backward(replace(batch, divisor=batch.divisor / scale), loss)
    found = sum_over(own, model.groups.replicas)
    if model.groups.reproducible and own.dtype != learner.parameters[0].parameter.dtype:
        found = found.float()  # it was added up in float64 (sum_of_losses)
    total = found.item() / scale
    _require_finite(learner, "loss", total)
    return total


def _update(
    learner: Learner, learning_rate: float, gradient_clip: float, observer: StepObserver | None
) -> float | None:
    """Complete the gradients, clip them and update; their norm before clipping, or None after an overflow.

    An overflow in float16 leaves the weights and moments alone, and lowers the loss scale from here on.
    """
    parameters, optimizer, scale = learner.parameters, learner.optimizer, learner.loss_scale.scale
    learner.replicas.complete()
    if observer is not None:
        observer.gradients(parameters)
    norm = global_gradient_norm(parameters, learner.model.groups) / scale
    if not torch.isfinite(norm) and learner.loss_scale.overflowed():
        optimizer.zero_grad()
        return None
    _require_finite(learner, "gradient norm", norm.item())
    clip_gradients(parameters, norm, gradient_clip, scale)
    set_learning_rate(optimizer, learning_rate)
    optimizer.step()
    learner.replicas.publish()
    optimizer.zero_grad()
    learner.loss_scale.succeeded()
    return norm.item()


def _require_finite(learner: Learner, what: str, value: float) -> None:
    """Stop, on every rank alike, before a step that would spoil the weights."""
    if not math.isfinite(value):
        raise NotFinite(
            f"the {what} of step {learner.step + 1} is {value}; the step was not taken. Continue from the last "
            "checkpoint with a lower --learning-rate, or look at the data of this step"
        )
