"""The Argonne model over a pipeline: each rank has some of its stages, and may train, evaluate and sample."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from argonne.kernels import Backend
from argonne.models.argonne import ArgonneModel, ArgonneStage, Reduction, pad_to_share
from argonne.models.config import ArgonneConfig
from argonne.models.decoder import Span
from argonne.parallel import Precision, ProcessGroups, ShardedParameter, initialise, shard_sequence
from argonne.parallel.pipeline_parallel.plan import PipelinePlan, balance
from argonne.parallel.pipeline_parallel.stages import Activation, broadcast_from_last_stage, pipeline_forward

if TYPE_CHECKING:
    from argonne.parallel.pipeline_parallel.schedule import Pipeline


class PipelinedModel(nn.Module):
    """The model of which this rank holds the stages that ``plan`` gives it; used as ``ArgonneModel``.

    Args:
        config: the model's shape.
        groups: the processes; the stages lie along ``groups.pipeline``.
        precision: the dtypes.
        plan: the schedule and the stages.
        backend: as of ``ArgonneStage``.

    Raises:
        LayoutError: the shape cannot be shared out as the layout and the plan ask.
    """

    def __init__(
        self,
        config: ArgonneConfig,
        groups: ProcessGroups,
        precision: Precision,
        plan: PipelinePlan,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        plan.check_layers(config.num_hidden_layers)
        self.config, self.groups, self.precision, self.plan = config, groups, precision, plan
        self.costs, spans = cut(config, plan.stages)
        self.stages = nn.ModuleDict(
            {
                str(stage): ArgonneStage(config, groups, precision, spans[stage], backend)
                for stage in plan.held(groups.pipeline.rank)
            }
        )
        held = list(self.held.values())
        self.ties = config.tie_word_embeddings and (held[0].model.span.is_first or held[-1].model.span.is_last)
        if self.ties and len(held) > 1 and held[0].model.span.is_first and held[-1].model.span.is_last:
            held[-1].model.embed_tokens = held[0].model.embed_tokens
            self.ties = False
        self._pipelines: dict[tuple[int, ...], Pipeline] = {}
        self._divisor = 1.0

    @property
    def defers_weight_gradients(self) -> bool:
        """As of ``ArgonneModel``: under zero bubble."""
        return self.plan.schedule == "zb"

    @property
    def held(self) -> dict[int, ArgonneStage]:
        """The stages of this rank."""
        return {int(number): stage for number, stage in self.stages.items() if isinstance(stage, ArgonneStage)}

    @property
    def last(self) -> ArgonneStage | None:
        """The last stage, if this rank has it."""
        return self.held.get(self.plan.stages - 1)

    def sharded_parameters(self) -> list[ShardedParameter]:
        """Every parameter of this rank's stages, under the names of the whole model."""
        ends = (self.plan.rank_of(0), self.plan.rank_of(self.plan.stages - 1))
        found: dict[int, ShardedParameter] = {}
        for stage in self.held.values():
            for sharded in stage.sharded_parameters():
                if self.ties and sharded.parameter is stage.embedding_weight:
                    regions = tuple(replace(region, stages=ends) for region in sharded.spec.regions)
                    sharded = replace(sharded, spec=replace(sharded.spec, regions=regions))
                found.setdefault(id(sharded.parameter), sharded)
        return list(found.values())

    def recompute_blocks(self, enabled: bool) -> None:
        """As ``ArgonneModel.recompute_blocks``, for the stages of this rank."""
        for stage in self.held.values():
            stage.recompute_blocks(enabled)

    def initialise(self, seed: int) -> None:
        """Fill every parameter with values that depend on the seed and the whole tensor's name only."""
        initialise(self.sharded_parameters(), seed)

    def forward_backward(self, ids: Tensor, targets: Tensor, divisor: float, documents: Tensor | None = None) -> Tensor:
        """As ``ArgonneModel.forward_backward``, in the order of the schedule; the loss on every rank."""
        micro_batches, batch, sequence = ids.shape
        pipeline = self.pipeline(micro_batches, batch, sequence)
        self._divisor = divisor
        for stage in self.held.values():
            stage.sequence, stage.whole = sequence, False
        local_ids, local_targets = (
            shard_sequence(x, self.groups.context, 2).flatten(0, 1).contiguous() for x in (ids, targets)
        )
        options = {} if documents is None else {"documents": documents.flatten(0, 1)}
        loss = pipeline.forward_backward(local_ids, local_targets, **options)
        like = torch.zeros((), dtype=self.precision.statistics, device=ids.device)
        return broadcast_from_last_stage(loss, like, self.plan, self.groups.pipeline)

    def pipeline(self, micro_batches: int, batch: int, sequence: int) -> Pipeline:
        """The pipeline for steps of this shape, built when it is first needed."""
        from argonne.parallel.pipeline_parallel.schedule import Pipeline  # takes a moment

        key = (micro_batches, batch, sequence)
        if key not in self._pipelines:
            local = sequence // self.groups.context.size
            self._pipelines[key] = Pipeline(
                self.held,
                self.plan,
                self.groups.pipeline,
                Activation((batch, local), torch.int64),
                self._activation(batch, local),
                self._loss,
                micro_batches,
                self.groups.device,
            )
        return self._pipelines[key]

    @torch.no_grad()
    def loss(
        self, ids: Tensor, targets: Tensor, reduction: Reduction = "none", documents: Tensor | None = None
    ) -> Tensor:
        """As ``ArgonneModel.loss``, on every rank and without gradients: to evaluate."""
        x = self._forward(shard_sequence(ids, self.groups.context), ids.shape[1], whole=False, documents=documents)
        local = shard_sequence(targets, self.groups.context)
        shape = () if reduction == "sum" else local.shape
        like = torch.zeros(shape, dtype=self.precision.statistics, device=ids.device)
        losses = None if self.last is None else self.last.losses(_given(x), local, reduction)
        return broadcast_from_last_stage(losses, like, self.plan, self.groups.pipeline)

    @torch.no_grad()
    def next_token_logits(self, ids: Tensor) -> Tensor:
        """``[batch, sequence]`` ids -> the last position's logits ``[batch, vocabulary]``, on every rank."""
        padded = pad_to_share(ids, self.groups)
        x = self._forward(padded, padded.shape[1], whole=True)
        shape = (len(ids), self.config.vocab_size)
        like = torch.zeros(shape, dtype=self.precision.compute, device=ids.device)
        logits = None if self.last is None else self.last.last_logits(_given(x), len(ids), ids.shape[1] - 1)
        return broadcast_from_last_stage(logits, like, self.plan, self.groups.pipeline)

    def _forward(self, ids: Tensor, sequence: int, whole: bool, **options: Any) -> Tensor | None:
        for stage in self.held.values():
            stage.sequence, stage.whole = sequence, whole
        activation = self._activation(*ids.shape)
        return pipeline_forward(self.held, self.plan, self.groups.pipeline, ids, activation, **options)

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        assert self.last is not None
        return self.last.losses(x, targets, "sum") / self._divisor

    def _activation(self, batch: int, positions: int) -> Activation:
        share = self.groups.tensor.size if self.groups.sequence_parallel else 1
        return Activation((batch * positions // share, self.config.hidden_size), self.precision.compute)


def build_model(
    config: ArgonneConfig,
    groups: ProcessGroups,
    precision: Precision,
    plan: PipelinePlan,
    backend: Backend = "auto",
) -> ArgonneModel | PipelinedModel:
    """The model for the layout of ``groups``: as one, or in the stages of ``plan``."""
    if groups.pipeline.size == 1:
        return ArgonneModel(config, groups, precision, backend)
    return PipelinedModel(config, groups, precision, plan, backend)


def cut(config: ArgonneConfig, stages: int) -> tuple[list[float], list[Span]]:
    """The cost of each stage in units of a block's matrix products, and what it holds; balanced by cost.

    A token costs a block its parameters in multiply-adds (and attention, which all blocks share alike); the head
    costs vocabulary x hidden. The embedding is a lookup, whose gradient is a pass over hidden values: a block has
    some 12 x hidden of those for each, so it counts as one part in 12 x hidden of a block's parameters.
    """
    block = config.block_parameter_count
    head = config.vocab_size * config.hidden_size / block
    embedding = 12 * config.hidden_size / block
    runs = balance([1.0] * config.num_hidden_layers, stages, embedding, head)
    spans = [Span(run, index == 0, index == stages - 1) for index, run in enumerate(runs)]
    costs = [len(span.layers) + embedding * span.is_first + head * span.is_last for span in spans]
    return costs, spans


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
