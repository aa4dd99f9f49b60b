"""The parts of the contract that follow from a forward pass and a head: what a model of one's own may build on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from argonne.models.contract import Batch, Head, LossFunction, SpecialTokens
from argonne.models.execution import Execution
from argonne.parallel import (
    Layout,
    LayoutError,
    ProcessGroups,
    ShardedParameter,
    VocabParallelEmbedding,
    VocabParallelHead,
    column_parallel_linear,
    gather_from_sequence_region,
    sharded_parameters,
)
from argonne.parallel.communication.collectives import all_gather
from argonne.parallel.communication.reduction import sum_of_losses


class BaseModel(nn.Module):
    """A ``LanguageModel`` but for ``shape``, ``longest_sequence``, ``head`` and ``forward``, which a subclass adds.

    ``forward`` maps a micro-batch (``Batch``) to the last hidden values ``[batch * positions, hidden]``, or this rank's
    share of those rows under sequence parallelism. ``head`` holds the output weight. Attention must be causal.
    ``head`` and ``blocks`` may be modules that are assigned (``self.head = ...``), or properties.
    """

    def __init__(self, execution: Execution) -> None:
        super().__init__()
        self.execution = execution

    @property
    def groups(self) -> ProcessGroups:
        """The processes that share the model."""
        return self.execution.groups

    @property
    def left_to_subclasses(self) -> Sequence[str]:
        """What it needs that the contract does not name, but for pipelines, whose stages do the work."""
        return ("forward", "head") if self.groups.pipeline.size == 1 else ()

    @property
    def head(self) -> Head:
        """The holder of the output weight: the module that is assigned to it."""
        head = self._modules.get("head")
        if not isinstance(head, VocabParallelEmbedding | VocabParallelHead):
            raise NotImplementedError
        return head

    @property
    def shape(self) -> Mapping[str, Any]:
        """What makes it this model and no other, as JSON values."""
        raise NotImplementedError

    @property
    def parameter_count(self) -> int:
        """Parameters of the whole model, on ranks that hold a region of every tensor (the first always does)."""
        wholes = {r.name: r.whole_shape for s in self.sharded_parameters() for r in s.spec.regions}
        return sum(math.prod(shape) for shape in wholes.values())

    @property
    def masks_documents(self) -> bool:
        """Not unless a subclass says so, whose attention heeds ``batch.documents``."""
        return False

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The modules of the list that is assigned to it. Without one, FSDP gathers the whole model at once."""
        blocks = self._modules.get("blocks")
        return list(blocks) if isinstance(blocks, nn.ModuleList | nn.Sequential) else []

    @property
    def stages(self) -> Mapping[int, nn.Module]:
        """None: the model cannot be a pipeline."""
        return {}

    @property
    def defers_weight_gradients(self) -> bool:
        """Only pipelines do."""
        return False

    def check_layout(self, layout: Layout) -> None:
        """Raise ``LayoutError`` for axes that the model has to know of and does not.

        A subclass whose attention is over ``groups.context`` (``context_parallel_attention``) says so by its own.
        """
        for axis in ("pipeline", "context"):
            if (size := getattr(layout, axis)) > 1:
                raise LayoutError(
                    f"{axis}_parallel={size} is not offered by model={type(self).__name__}; legal: 1 (or a model whose "
                    f"check_layout allows it{' and that has stages' if axis == 'pipeline' else ''})"
                )

    def sharded_parameters(self) -> list[ShardedParameter]:
        """Every parameter with the whole tensors that it holds regions of, in module order."""
        return sharded_parameters(self, self.groups)

    def forward_backward(self, batch: Batch, loss: LossFunction) -> Tensor:
        """Add up the gradients of a step, micro-batch after micro-batch; see ``LanguageModel``."""
        losses = []
        for micro_batch in batch.micro_batches():
            value = self._loss(micro_batch, loss) / batch.divisor
            value.backward()
            losses.append(value.detach())
        return sum_of_losses(losses, self.groups.replicas)

    @torch.no_grad()
    def evaluate(self, batch: Batch, loss: LossFunction) -> Tensor:
        """The summed loss of one micro-batch; see ``LanguageModel``."""
        return self._loss(batch, loss)

    @torch.no_grad()
    def next_token_logits(self, ids: Tensor) -> Tensor:
        """``[batch, sequence]`` ids -> the last position's logits ``[batch, vocabulary]``, on every rank."""
        padded = pad_to_share(ids, self.groups)
        hidden = self(Batch(padded, padded))
        return last_logits(hidden, self.head, self.groups, len(ids), ids.shape[1] - 1)

    def flops_per_token(self, sequence: int) -> float:
        """Six for each parameter: a multiply-add forward and two backward. What attention adds is not counted."""
        return 6.0 * self.parameter_count

    def config_json(self, longest_sequence: int, special_tokens: SpecialTokens, dtype: str) -> dict[str, Any]:
        """The shape under the model's own name, which no other library knows how to open."""
        trained = {"max_position_embeddings": longest_sequence, "dtype": dtype}
        return {"architectures": [type(self).__name__], **self.shape, **trained, **special_tokens}

    def facts(self, micro_batches: int, batch: int, sequence: int) -> list[str]:
        """Nothing."""
        return []

    def _loss(self, micro_batch: Batch, loss: LossFunction) -> Tensor:
        return loss(self(micro_batch), self.head, micro_batch.shard(self.groups.context))


def pad_to_share(ids: Tensor, groups: ProcessGroups) -> Tensor:
    """Ids whose positions sequence parallelism can share out: what is added comes last, and nothing sees it."""
    return F.pad(ids, (0, -ids.shape[1] % groups.tensor.size if groups.sequence_parallel else 0))


def last_logits(hidden: Tensor, head: Head, groups: ProcessGroups, batch: int, position: int) -> Tensor:
    """The logits ``[batch, vocabulary]`` of one position of ``[batch * positions, hidden]``, on all tensor ranks."""
    positions = len(hidden) * (groups.tensor.size if groups.sequence_parallel else 1) // batch
    local = logits_of(hidden, head, groups, torch.arange(batch, device=hidden.device) * positions + position)
    whole = rearrange(all_gather(local, groups.tensor), "rank batch token -> batch (rank token)")
    # Only the last ranks have padding, so that it lies behind every real token.
    return whole[:, : head.range.vocabulary]


def logits_of(hidden: Tensor, head: Head, groups: ProcessGroups, rows: Tensor) -> Tensor:
    """This rank's logits of rows of ``[batch * positions, hidden]``: ``[rows, head.range.rows]``, of padding too."""
    if groups.sequence_parallel:
        hidden = gather_from_sequence_region(hidden, groups.tensor)
    copy = head.working.of(head.weight)
    return column_parallel_linear(
        hidden[rows], head.weight, head.bias, groups.tensor, head.precision, cut=head.cut, copy=copy
    )
