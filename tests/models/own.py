"""Models that are not ours, as small as can be: one that is shared out over tensor ranks, and one with stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argonne.models import BaseModel, Batch, Execution, LossFunction
from argonne.parallel import (
    Activation,
    ColumnParallelLinear,
    Layout,
    Normal,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    pipeline_forward,
)
from argonne.parallel.pipeline_parallel.stages import broadcast_from_last_stage

VOCABULARY, HIDDEN, FEATURES = 37, 8, 12
WIDE = Normal(0.4)


class Mix(nn.Module):
    """A pair of layers with the mean over all positions so far between them."""

    def __init__(self, execution: Execution, hidden: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"precision": execution.precision, "initialiser": WIDE}
        self.up = ColumnParallelLinear(hidden, FEATURES, execution.groups, **options)
        self.down = RowParallelLinear(FEATURES, hidden, execution.groups, **options)

    def forward(self, x: Tensor, sequence: int) -> Tensor:
        features = F.gelu(self.up(x)).unflatten(0, (-1, sequence))
        count = torch.arange(1, sequence + 1, dtype=features.dtype, device=features.device)
        return x + self.down((features.cumsum(1) / count[:, None]).flatten(0, 1))


class Small(BaseModel):
    """The embedding, one block, and a norm of torch's own with values that no initialiser of ours makes."""

    longest_sequence = 24

    def __init__(self, execution: Execution, vocabulary: int = VOCABULARY, hidden: int = HIDDEN) -> None:
        super().__init__(execution)
        self.vocabulary, self.hidden = vocabulary, hidden
        options: dict[str, Any] = {"precision": execution.precision, "initialiser": WIDE}
        self.embed = VocabParallelEmbedding(vocabulary, hidden, execution.groups, **options)
        self.blocks = nn.ModuleList([Mix(execution, hidden)])
        self.norm = nn.LayerNorm(hidden, dtype=execution.precision.parameters)
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(0.5, 1.5, hidden))
        self.head = VocabParallelHead(vocabulary, hidden, execution.groups, **options)

    @property
    def shape(self) -> Mapping[str, Any]:
        return {"hidden": self.hidden, "vocabulary": self.vocabulary}

    def forward(self, batch: Batch) -> Tensor:
        x = self.embed(batch.ids.flatten())
        for block in self.blocks:
            x = self.execution.run(block, x, batch.ids.shape[1])
        return self.norm(x)


def dense_logits(weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """``[batch, sequence]`` ids -> the logits of ``Small``, in plain torch."""
    x = F.embedding(ids, weights["embed.weight"])
    features = F.gelu(x @ weights["blocks.0.up.weight"].T)
    mean = features.cumsum(1) / torch.arange(1, ids.shape[1] + 1, dtype=x.dtype)[:, None]
    x = x + mean @ weights["blocks.0.down.weight"].T
    x = F.layer_norm(x, x.shape[-1:], weights["norm.weight"], weights["norm.bias"])
    return x @ weights["head.weight"].T


class Piece(nn.Module):
    """One stage: a block, behind the embedding in the first, before the head in the last."""

    def __init__(self, execution: Execution, number: int, stages: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"precision": execution.precision, "initialiser": WIDE}
        vocabulary = (VOCABULARY, HIDDEN, execution.groups)
        self.embed = VocabParallelEmbedding(*vocabulary, **options) if number == 0 else None
        self.block = Mix(execution, HIDDEN)
        self.head = VocabParallelHead(*vocabulary, **options) if number == stages - 1 else None

    def forward(self, x: Tensor, sequence: int) -> Tensor:
        return self.block(x if self.embed is None else self.embed(x.flatten()), sequence)


class Staged(BaseModel):
    """A block a stage: ``execution.plan`` says which of them this rank holds."""

    longest_sequence = 24
    parameter_count = 2 * VOCABULARY * HIDDEN + 2 * 2 * HIDDEN * FEATURES
    """Of two stages."""

    def __init__(self, execution: Execution, vocabulary: int = VOCABULARY) -> None:
        super().__init__(execution)
        assert execution.plan is not None
        self.plan, axis = execution.plan, execution.groups.pipeline
        held = self.plan.held(axis.rank) if axis.size > 1 else range(2)
        self.pieces = nn.ModuleDict({str(n): Piece(execution, n, 2) for n in held})

    @property
    def shape(self) -> Mapping[str, Any]:
        return {"stages": 2}

    @property
    def stages(self) -> Mapping[int, nn.Module]:
        return {int(number): piece for number, piece in self.pieces.items()}

    @property
    def head(self) -> VocabParallelHead:
        return self.pieces["1"].head  # type: ignore[return-value]

    def check_layout(self, layout: Layout) -> None:
        assert layout.pipeline in (1, 2)

    def forward(self, batch: Batch) -> Tensor:
        return self.pieces["1"](self.pieces["0"](batch.ids, batch.ids.shape[1]), batch.ids.shape[1])

    def forward_backward(self, batch: Batch, loss: LossFunction) -> Tensor:
        if self.groups.pipeline.size == 1:
            return super().forward_backward(batch, loss)
        from argonne.parallel.pipeline_parallel.schedule import Pipeline

        def loss_of(hidden: Tensor, number: Tensor) -> Tensor:
            return loss(hidden, self.head, batch.micro_batch(int(number))) / batch.divisor

        count, size, sequence = batch.ids.shape
        first, between = Activation((size, sequence), torch.int64), self._activation(size, sequence)
        axis = self.groups.pipeline
        pipeline = Pipeline(self.stages, self.plan, axis, first, between, count, self.groups.device)
        ids = batch.ids.flatten(0, 1).contiguous()
        return self._everywhere(pipeline.forward_backward(ids, torch.arange(count), loss_of, sequence=sequence))

    @torch.no_grad()
    def evaluate(self, batch: Batch, loss: LossFunction) -> Tensor:
        if self.groups.pipeline.size == 1:
            return super().evaluate(batch, loss)
        between, axis = self._activation(*batch.ids.shape), self.groups.pipeline
        sequence = batch.ids.shape[1]
        hidden = pipeline_forward(self.stages, self.plan, axis, batch.ids, between, sequence=sequence)
        return self._everywhere(None if hidden is None else loss(hidden, self.head, batch))

    def _activation(self, size: int, sequence: int) -> Activation:
        return Activation((size * sequence, HIDDEN), self.execution.precision.compute)

    def _everywhere(self, value: Tensor | None) -> Tensor:
        like = torch.zeros((), dtype=self.execution.precision.statistics)
        return broadcast_from_last_stage(value, like, self.plan, self.groups.pipeline)


class Unstaged(Small):
    """It lets every layout through, and has no stages."""

    def check_layout(self, layout: Layout) -> None:
        pass
