"""What training, evaluation, sampling and saving ask of a model, and what they hand to it.

``LanguageModel`` is the whole contract: a model that has its members trains through the whole workflow, whoever wrote
it. ``argonne.models.base.BaseModel`` has most of them already; ``docs/your-model.md`` walks through it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from argonne.parallel import (
    ArgonneError,
    Axis,
    Draws,
    Layout,
    ProcessGroups,
    ShardedParameter,
    VocabParallelEmbedding,
    VocabParallelHead,
    shard_sequence,
)

Head = VocabParallelEmbedding | VocabParallelHead
"""What holds the output weight: the embedding where the two are tied."""

SpecialTokens = Mapping[str, int | None]
"""``bos_token_id``, ``eos_token_id`` and ``pad_token_id``."""


@dataclass(frozen=True)
class Batch:
    """What a model computes on: one micro-batch, or those of a step stacked along a first dimension.

    Sequences are whole, on every rank that works on them; a model takes its context-parallel share itself.
    """

    ids: Tensor
    """``[batch, sequence]`` or ``[micro-batches, batch, sequence]`` token ids."""
    targets: Tensor
    """The same shape: the token that follows each; -100 where a position has no loss."""
    documents: Tensor | None = None
    """The same shape: positions with different numbers do not see each other. None: all of a sequence do."""
    weights: Tensor | None = None
    """The same shape: what the loss of each position counts. None: each counts 1."""
    divisor: float = 1.0
    """What the summed loss is divided by: the target tokens of the global batch, over the loss scale."""
    draws: Draws | None = None
    """What random numbers (of dropout) follow from. None: nothing is drawn, as where a model is only used."""

    def micro_batches(self) -> Iterator[Batch]:
        """Each micro-batch of a step."""
        return map(self.micro_batch, range(len(self.ids)))

    def micro_batch(self, number: int) -> Batch:
        """The micro-batch of that number of a step."""
        documents, weights = (None if x is None else x[number] for x in (self.documents, self.weights))
        draws = None if self.draws is None else self.draws.micro_batch(number)
        ids, targets = self.ids[number], self.targets[number]
        return replace(self, ids=ids, targets=targets, documents=documents, weights=weights, draws=draws)

    def shard(self, axis: Axis) -> Batch:
        """This rank's positions of it, but of ``documents``, which say what attention sees of whole sequences."""
        if axis.size == 1:
            return self
        weights = None if self.weights is None else shard_sequence(self.weights, axis, -1)
        ids, targets = (shard_sequence(x, axis, -1) for x in (self.ids, self.targets))
        return replace(self, ids=ids, targets=targets, weights=weights)


class LossFunction(Protocol):
    """What is minimised: pretraining's is ``argonne.models.loss.CrossEntropyLoss``."""

    def __call__(self, hidden: Tensor, head: Head, batch: Batch) -> Tensor:
        """The loss summed over positions, a scalar that is the same on all tensor-parallel ranks; not divided.

        Args:
            hidden: ``[rows, hidden]``, the model's last hidden values: under sequence parallelism a share of the
                rows ``[batch * positions]`` of the micro-batch, otherwise all of them.
        """


class LanguageModel(Protocol):
    """A model that the training workflow can train, evaluate, sample from and save.

    Every method is collective over ``groups``. The model is built on every rank from the same arguments; its
    parameters are empty until ``initialise`` or a checkpoint fills them.
    """

    @property
    def groups(self) -> ProcessGroups:
        """The processes that share it."""

    @property
    def shape(self) -> Mapping[str, Any]:
        """What makes it this model and no other, as JSON values: a run goes on only with the same."""

    @property
    def longest_sequence(self) -> int:
        """The most positions that it can see at once."""

    @property
    def parameter_count(self) -> int:
        """Parameters of the whole model, over all ranks; a tied weight counts once."""

    @property
    def masks_documents(self) -> bool:
        """Whether attention keeps the documents of a batch apart (``--document-mask``)."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The modules whose parameters FSDP gathers together, just before each is used: those of this rank."""

    @property
    def stages(self) -> Mapping[int, nn.Module]:
        """The pipeline stages that this rank holds, by their number; empty for a model that offers none."""

    @property
    def defers_weight_gradients(self) -> bool:
        """Whether gradients come later than backward says: see ``DataParallel.begin``."""

    def check_layout(self, layout: Layout) -> None:
        """Raise ``LayoutError`` unless the model can be shared out as ``layout`` asks."""

    def sharded_parameters(self) -> list[ShardedParameter]:
        """Every parameter of this rank with the whole tensors that it holds regions of, in an order that is fixed."""

    def forward_backward(self, batch: Batch, loss: LossFunction) -> Tensor:
        """Add to the gradients those of a step's summed and divided loss; returns that loss, detached.

        ``batch`` has a dimension of micro-batches. The loss is of this data- and context-parallel rank's positions.
        """

    def evaluate(self, batch: Batch, loss: LossFunction) -> Tensor:
        """The summed loss of one micro-batch, of this data- and context-parallel rank's positions, without gradients.

        It is not divided.
        """

    def next_token_logits(self, ids: Tensor) -> Tensor:
        """``[batch, sequence]`` ids -> the last position's logits ``[batch, vocabulary]``, the same on every rank."""

    def flops_per_token(self, sequence: int) -> float:
        """Floating-point operations of a forward and a backward pass for one token of a sequence of that length."""

    def facts(self, micro_batches: int, batch: int, sequence: int) -> list[str]:
        """What the line that a run begins with says of steps of this shape."""

    def config_json(self, longest_sequence: int, special_tokens: SpecialTokens, dtype: str) -> dict[str, Any]:
        """What ``config.json`` says beside the saved weights.

        Args:
            longest_sequence: the positions that it was trained on.
            dtype: of the saved weights, ``float32`` say.
        """


def require_contract(model: object) -> None:
    """Raise ``ArgonneError`` naming what ``model`` lacks of ``LanguageModel``, or has as something else."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ArgonneError(f"model={name} is no torch.nn.Module; legal: one that is")
    members = {member: found for member, found in vars(LanguageModel).items() if not member.startswith("_")}
    missing = [member for member in (*members, *getattr(model, "left_to_subclasses", ())) if _lacks(model, member)]
    if missing:
        raise ArgonneError(
            f"model={name} has no {', '.join(missing)}; legal: a model with every member of "
            "argonne.models.LanguageModel (argonne.models.BaseModel has most of them)"
        )
    for member, found in members.items():
        is_value = isinstance(found, property)
        if is_value == inspect.isroutine(getattr(model, member)):
            is_now, legal = ("a method", "a property") if is_value else ("no method", "a method")
            raise ArgonneError(f"{member} of model={name} is {is_now}; legal: {legal}")


def _lacks(model: nn.Module, member: str) -> bool:
    try:
        found = getattr(model, member)
    except (AttributeError, NotImplementedError):
        return True
    return getattr(found, "__func__", None) is nn.Module.forward
