"""What a run minimises, known before its model is built: pretraining's cross-entropy, or a loss that is handed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from argonne.kernels import Backend
from argonne.models import CrossEntropyLoss, LanguageModel, LossFunction
from argonne.parallel import Distillation, Objective, Precision, ProcessGroups
from argonne.training.config import RunConfig


class LossOfRun(Protocol):
    """A loss and what it needs, on one rank; every method is collective over all ranks."""

    @property
    def identity(self) -> Mapping[str, Any] | None:
        """Its part of what the run is, as JSON values, besides what the flags of pretraining say; None: nothing."""
        ...

    @property
    def objective(self) -> Objective | Distillation:
        """What is computed of each position."""
        ...

    def settled(self, groups: ProcessGroups, tokenizer: PreTrainedTokenizerFast | None, tokens: int) -> LossOfRun:
        """The same once the tokenizer is known, which the first rank has, and how many tokens it has.

        Raises:
            ArgonneError: on every rank, why they do not fit each other.
        """
        ...

    def build(
        self, model: LanguageModel, precision: Precision, parts: list[Tensor] | None, *, rehearsed: bool = False
    ) -> LossFunction:
        """The loss for ``model``, with all that it holds.

        Args:
            model: what is trained.
            precision: the run's dtypes.
            parts: is given what the loss is made of, as ``CrossEntropyLoss.parts``.
            rehearsed: only its memory counts: nothing is read, and no rank hears of another.
        """
        ...


LossBuilder = Callable[[RunConfig, ProcessGroups], LossOfRun]
"""Says what a run minimises (collective)."""


@dataclass(frozen=True)
class CrossEntropyOfRun:
    """Pretraining's."""

    objective: Objective
    kernels: Backend
    identity: None = None
    """Label smoothing and z-loss are parts of the schedule's."""

    def settled(
        self, groups: ProcessGroups, tokenizer: PreTrainedTokenizerFast | None, tokens: int
    ) -> CrossEntropyOfRun:
        """Itself."""
        return self

    def build(
        self, model: LanguageModel, precision: Precision, parts: list[Tensor] | None, *, rehearsed: bool = False
    ) -> LossFunction:
        """It needs nothing."""
        return CrossEntropyLoss(self.objective, self.kernels, parts)


def cross_entropy(config: RunConfig, groups: ProcessGroups) -> CrossEntropyOfRun:
    """Pretraining's, of its flags; a ``LossBuilder``."""
    return CrossEntropyOfRun(config.training.objective, config.training.kernels)
