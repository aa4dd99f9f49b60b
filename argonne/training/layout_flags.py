"""The flags of a layout: of one model, and of training with its replicas and its pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from argonne.parallel.communication.layout import Layout
from argonne.parallel.data_parallel.kinds import Kind
from argonne.parallel.errors import ArgonneError
from argonne.parallel.pipeline_parallel.plan import PipelinePlan, ScheduleName


@dataclass(frozen=True)
class LayoutFlags:
    """The layout of one model: one size for each axis; their product is the number of processes."""

    tensor_parallel: int | None = None
    """Processes that share each layer [all that the other axes leave]."""
    pipeline_parallel: int | Literal["auto"] = 1
    """Processes that hold successive layers; auto: all that the other axes leave."""
    context_parallel: int = 1
    """Processes that share each sequence: for long ones."""
    sequence_parallel: bool = False
    """Share out the tokens between the tensor-parallel layers: less memory for activations, a quarter more to send."""
    uneven_shards: bool = False
    """Allow heads and a feed-forward width that do not divide by --tensor-parallel: some ranks get one more."""

    def layout(self, world_size: int) -> Layout:
        """The layout of ``world_size`` processes. Raises ``LayoutError`` when they do not match."""
        auto = self.pipeline_parallel == "auto"
        layout = Layout(
            tensor=1 if self.tensor_parallel is None else self.tensor_parallel,
            pipeline=1 if isinstance(self.pipeline_parallel, str) else self.pipeline_parallel,
            data=self.replicas,
            context=self.context_parallel,
            sequence_parallel=self.sequence_parallel,
            uneven_shards=self.uneven_shards,
        )
        left = max(1, world_size // layout.world_size)
        if auto:
            layout = replace(layout, pipeline=left)
        elif self.tensor_parallel is None:
            layout = replace(layout, tensor=left)
        layout.require_world_size(world_size)
        return layout

    @property
    def replicas(self) -> int:
        """Of the model."""
        return 1


@dataclass(frozen=True)
class ParallelFlags(LayoutFlags):
    """The layout of training: one size for each axis, and how the replicas and the pipeline work."""

    pipeline_schedule: ScheduleName = "1f1b"
    """The order of a pipeline's work: 1f1b (least memory), interleaved (several stages a process, a smaller
    bubble), zb (zero bubble: two stages a process, weight gradients while it would wait) or gpipe."""
    pipeline_interleave: int = 2
    """Stages a process has when the schedule is interleaved."""
    data_parallel: int = 1
    """Replicas of the model, each with its own samples of a step."""
    fsdp: bool = False
    """Share out parameters, gradients and optimizer state over the data- and context-parallel processes (FSDP2)."""
    fsdp_shard: int | None = None
    """Share out over groups of so many neighbouring processes only, which are replicas of each other (hybrid
    sharding), with --fsdp [all data- and context-parallel processes]."""
    zero1: bool = False
    """Share out the optimizer's state alone over them (ZeRO stage 1)."""
    reproducible: bool = False
    """The same bits at every layout: sums in one order, products in blocks that no layout cuts (slower)."""
    reproducible_blocks: int | None = None
    """Blocks along the tensor axis, with --reproducible: the most tensor-parallel processes that the run can ever
    have [the number of key-value heads]."""

    @property
    def replicas(self) -> int:
        """Of the model."""
        return self.data_parallel

    @property
    def kind(self) -> Kind:
        """The kind of data parallelism. Raises ``ArgonneError`` when the flags ask for two."""
        if self.fsdp and self.zero1:
            raise ArgonneError("fsdp=True conflicts with zero1=True, which shares out less; legal: one of them")
        return "fsdp" if self.fsdp else "zero1" if self.zero1 else "replicate"

    def plan(self, layout: Layout) -> PipelinePlan:
        """The pipeline's stages. Raises ``LayoutError`` when the schedule has none such."""
        return PipelinePlan.of(self.pipeline_schedule, layout.pipeline, self.pipeline_interleave)
