"""A model that is a row of stages: what any decoder does with them, in one process or in a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from argonne.kernels import cross_entropy
from argonne.models.activations import Widths, told
from argonne.models.base import BaseModel, last_logits, logits_of, pad_to_share
from argonne.models.cache import KeyValueCache, Scores
from argonne.models.compilation import CompiledForward, Graph
from argonne.models.contract import Batch, Head, LossFunction
from argonne.models.execution import Execution
from argonne.models.stages import Shape, Stage, cut
from argonne.parallel import (
    Activation,
    Layout,
    PipelinePlan,
    ShardedParameter,
    initialise,
    pipeline_forward,
    shard_sequence,
    sharded_parameters,
    vocab_parallel_logits,
)
from argonne.parallel.pipeline_parallel.stages import broadcast_from_last_stage

SCORED_AT_ONCE = 128
"""Places whose logits exist together."""

if TYPE_CHECKING:
    from argonne.parallel.pipeline_parallel.schedule import Pipeline


class StagedModel(BaseModel):
    """A causal language model: the stages that this rank holds, and the plan by which they work.

    A subclass makes the modules, under the names that its files have, and the ``Stage`` of each of its ``spans``.

    Raises:
        LayoutError: the shape cannot be shared out as the layout and the plan ask.
    """

    config: Shape

    def __init__(self, config: Shape, execution: Execution) -> None:
        super().__init__(execution)
        groups = execution.groups
        self.config, self.plan = config, execution.plan or PipelinePlan(groups.pipeline.size)
        self.check_layout(groups.layout)
        self.costs, spans = cut(config, self.plan.stages)
        self.spans = {stage: spans[stage] for stage in self.plan.held(groups.pipeline.rank)}
        # Not registered: the modules in them are the model's.
        self._stages: dict[int, Stage] = {}
        self._pipelines: dict[tuple[int, ...], Pipeline] = {}

    @property
    def shape(self) -> Mapping[str, Any]:
        return self.config.as_json()

    @property
    def longest_sequence(self) -> int:
        return self.config.max_position_embeddings

    @property
    def layers(self) -> list[int]:
        """The numbers of this rank's blocks."""
        return [number for span in self.spans.values() for number in span.layers]

    @property
    def masks_documents(self) -> bool:
        return True

    @property
    def parameter_count(self) -> int:
        return self.config.parameter_count

    @property
    def stages(self) -> Mapping[int, Stage]:
        """Those of this rank, by number; without a pipeline stage 0 is the whole model."""
        return self._stages

    @property
    def head(self) -> Head:
        """The holder of the output weight, on the rank of the last stage: the embedding when tied."""
        return self._stages[self.plan.stages - 1].head

    @property
    def defers_weight_gradients(self) -> bool:
        """Under zero bubble: see ``DataParallel.begin``."""
        return self.groups.pipeline.size > 1 and self.plan.schedule == "zb"

    def check_layout(self, layout: Layout) -> None:
        self.config.check_layout(layout)
        self.plan.check_layers(self.config.num_hidden_layers)

    def sharded_parameters(self) -> list[ShardedParameter]:
        """Every parameter of this rank, stage after stage, under the names of the whole model."""
        order: dict[int, int] = {}
        for parameter in (p for stage in self._stages.values() for p in stage.parameters()):
            order.setdefault(id(parameter), len(order))  # a tied weight has its place in the first of its stages
        found = sorted(sharded_parameters(self, self.groups), key=lambda sharded: order[id(sharded.parameter)])
        ends = (self.plan.rank_of(0), self.plan.rank_of(self.plan.stages - 1))
        embeddings = [stage.embed_tokens for stage in self._stages.values() if stage.embed_tokens is not None]
        if not embeddings or not self.config.tie_word_embeddings or ends[0] == ends[1]:
            return found
        tied = embeddings[0].weight
        return [_held_by(sharded, ends) if sharded.parameter is tied else sharded for sharded in found]

    def initialise(self, seed: int) -> None:
        """Fill every parameter with values that depend on seed, whole tensor's name and place in it only."""
        initialise(self.sharded_parameters(), seed)

    def forward(self, batch: Batch) -> Tensor:
        """A micro-batch -> its last hidden values ``[batch * positions, hidden]``, or this rank's share of the rows.

        Without a pipeline only.
        """
        return self._stages[0](shard_sequence(batch.ids, self.groups.context), **self.given(batch))

    def given(self, batch: Batch) -> dict[str, Any]:
        """What every stage is given by name, besides ids or hidden values; of a step, for all of its micro-batches.

        Tensors begin with the dimension of the sequences, which a pipeline cuts.
        """
        documents = {} if batch.documents is None else {"documents": batch.documents.flatten(0, -2)}
        return {"sequence": batch.ids.shape[-1], **documents}

    def prepare(self, batch: Batch) -> Iterator[tuple[str, Callable[[], Graph]]]:
        """For each compiled block, its name and what compiles it for micro-batches like ``batch``, one rank alone.

        Nothing is computed, and nothing sent; see ``CompiledForward.prepare``.
        """
        names = {module: name for name, module in self.named_modules()}
        activation = self._activation(len(batch.ids), batch.ids.shape[1] // self.groups.context.size)
        x = torch.zeros(activation.shape, dtype=activation.dtype, device=self.groups.device, requires_grad=True)
        for stage in self._stages.values():
            inputs = stage.block_inputs(**self.given(batch))
            for block in stage.blocks:
                if isinstance(block.forward, CompiledForward):
                    compute = self.execution.precision.compute
                    yield names[block], partial(block.forward.prepare, compute, x, inputs)

    def logits(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """``[batch, sequence]`` ids -> this rank's logits ``[batch, its positions, its tokens]``; as ``forward``."""
        local = ids.shape[1] // self.groups.context.size
        return vocab_parallel_logits(self(Batch(ids, ids, documents)), self.head).unflatten(0, (len(ids), local))

    def forward_backward(self, batch: Batch, loss: LossFunction) -> Tensor:
        """Add up the gradients of a step, in the order of the schedule; the loss on every rank."""
        if self.groups.pipeline.size == 1:
            return super().forward_backward(batch, loss)
        micro_batches, size, sequence = batch.ids.shape
        local = batch.shard(self.groups.context)

        def loss_of(hidden: Tensor, number: Tensor) -> Tensor:
            return loss(hidden, self.head, local.micro_batch(int(number))) / batch.divisor

        pipeline = self.pipeline(micro_batches, size, sequence)
        ids = local.ids.flatten(0, 1).contiguous()
        total = pipeline.forward_backward(ids, torch.arange(micro_batches), loss_of, **self.given(batch))
        return self._from_last(total, (), torch.float64 if self.groups.reproducible else None)

    def pipeline(self, micro_batches: int, batch: int, sequence: int) -> Pipeline:
        """The pipeline for steps of this shape, built when it is first needed."""
        from argonne.parallel.pipeline_parallel.schedule import Pipeline  # takes a moment

        key = (micro_batches, batch, sequence)
        if key not in self._pipelines:
            local = sequence // self.groups.context.size
            first, between = Activation((batch, local), torch.int64), self._activation(batch, local)
            axis, device = self.groups.pipeline, self.groups.device
            self._pipelines[key] = Pipeline(self._stages, self.plan, axis, first, between, micro_batches, device)
        return self._pipelines[key]

    @torch.no_grad()
    def evaluate(self, batch: Batch, loss: LossFunction) -> Tensor:
        """The summed loss of one micro-batch, on every rank; nothing is drawn."""
        batch = replace(batch, draws=None)
        if self.groups.pipeline.size == 1:
            return super().evaluate(batch, loss)
        local = batch.shard(self.groups.context)
        hidden = self._through(local.ids, **self.given(batch))
        return self._from_last(None if hidden is None else loss(hidden, self.head, local), ())

    @torch.no_grad()
    def next_token_logits(self, ids: Tensor) -> Tensor:
        padded = pad_to_share(ids, self.groups)
        hidden = self._through(padded, sequence=padded.shape[1], whole=True)
        logits = None
        if hidden is not None:
            logits = last_logits(hidden, self.head, self.groups, len(ids), ids.shape[1] - 1)
        return self._from_last(logits, (len(ids), self.config.vocab_size), self.execution.precision.compute)

    @property
    def scoring_stage(self) -> int:
        """The pipeline rank of the last stage."""
        return self.plan.rank_of(self.plan.stages - 1)

    @torch.no_grad()
    def next_token_scores(self, ids: Tensor, counts: Sequence[int], cache: KeyValueCache | None) -> Scores | None:
        """The logits behind each row, on the ranks of the last stage; see ``CachingModel``."""
        cached = None if cache is None else cache.begin(counts)
        later = cached is not None and not cached.is_first
        padded = pad_to_share(ids.view(1, -1) if later else ids, self.groups)
        hidden = self._through(padded, sequence=padded.shape[1], whole=True, cached=cached)
        if hidden is None:
            return None
        place = torch.arange(len(counts), device=ids.device)  # of a later pass: the rows are neighbours in one sequence
        if not later:
            place = place * padded.shape[1] + torch.tensor(counts, device=ids.device) - 1
        return Scores.of(logits_of(hidden, self.head, self.groups, place), self.head.range, self.groups.tensor)

    @torch.no_grad()
    def log_likelihoods(
        self,
        ids: Tensor,
        counts: Sequence[int],
        cache: KeyValueCache,
        places: Sequence[tuple[int, int]],
        targets: Sequence[int],
    ) -> Tensor | None:
        """Of a token behind each place, on the ranks of the last stage; see ``CachingModel``."""
        cached = cache.begin(counts)
        padded = pad_to_share(ids, self.groups)
        hidden = self._through(padded, sequence=padded.shape[1], whole=True, cached=cached)
        if hidden is None:
            return None
        width = padded.shape[1]
        begins = [row * width if cached.is_first else sum(counts[:row]) for row in range(len(counts))]
        at = torch.tensor([begins[row] + column for row, column in places], dtype=torch.int64, device=ids.device)
        wanted = torch.tensor(targets, dtype=torch.int64, device=ids.device)
        head, groups = self.head, self.groups
        found = [torch.zeros(0, dtype=self.execution.precision.statistics, device=ids.device)]
        for start in range(0, len(at), SCORED_AT_ONCE):
            some = slice(start, start + SCORED_AT_ONCE)
            logits = logits_of(hidden, head, groups, at[some])[:, : head.range.tokens]
            found.append(-cross_entropy(logits, wanted[some], vocabulary=head.range, axis=groups.tensor))
        return torch.cat(found)

    def flops_per_token(self, sequence: int) -> float:
        return self.config.flops_per_token(sequence)

    def facts(self, micro_batches: int, batch: int, sequence: int) -> list[str]:
        """What its blocks keep for backward; and of a pipeline, its schedule and how long its ranks wait."""
        found = [told(self.widths, self.execution, (batch, sequence), self.layers)] if self.widths else []
        if self.groups.pipeline.size == 1:
            return found
        waiting = self.pipeline(micro_batches, batch, sequence).bubble(self.costs)
        return [*found, f"{self.plan.schedule} in {self.plan.stages} stages, bubble {waiting:.0%}"]

    @property
    def widths(self) -> Widths | None:
        """What this rank has of a block, from which follows what is kept for backward; None where no one counts it."""
        return None

    def _through(self, ids: Tensor, **given: Any) -> Tensor | None:
        """One batch through every stage, without gradients: the hidden values on the last stage's rank."""
        activation = self._activation(*ids.shape)
        return pipeline_forward(self._stages, self.plan, self.groups.pipeline, ids, activation, **given)

    def _from_last(self, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """What the rank of the last stage has, on every rank of the pipeline."""
        if self.groups.pipeline.size == 1:
            assert value is not None
            return value
        like = torch.zeros(shape, dtype=dtype or self.execution.precision.statistics, device=self.groups.device)
        return broadcast_from_last_stage(value, like, self.plan, self.groups.pipeline)

    def _activation(self, batch: int, positions: int) -> Activation:
        share = self.groups.tensor.size if self.groups.sequence_parallel else 1
        return Activation((batch * positions // share, self.config.hidden_size), self.execution.precision.compute)


def _held_by(sharded: ShardedParameter, stages: tuple[int, ...]) -> ShardedParameter:
    """A parameter of which two pipeline ranks have a copy each."""
    regions = tuple(replace(region, stages=stages) for region in sharded.spec.regions)
    return replace(sharded, spec=replace(sharded.spec, regions=regions))
