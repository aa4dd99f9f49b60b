"""Pipeline parallelism: the stages of this rank, trained by the schedules of ``torch.distributed.pipelining``.

Import it when there is a pipeline to train: what it needs of PyTorch takes more than a second to import.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.reduction import sum_of_losses
from argonne.parallel.pipeline_parallel.plan import PipelinePlan, Work, bubble_fraction
from argonne.parallel.pipeline_parallel.stages import Activation
from argonne.parallel.tensor_parallel.deferral import Queue, deferring

_SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb": ScheduleZBVZeroBubble,
}


class _Unwrapped(nn.Module):
    """A stage under FSDP that the schedule does not know to be: it would hold back the sums of its gradients."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.stage(*arguments, **options)


class _SplitStage(PipelineStage):
    """A stage that leaves its weight gradients for later when the schedule asks for a backward of its input."""

    def __init__(self, module: nn.Module, index: int, stages: int, device: torch.device, **options: Any) -> None:
        self.queue: Queue = []
        super().__init__(module, index, stages, device, dw_builder=self._later, **options)

    def forward_one_chunk(self, *arguments: Any, **options: Any) -> Any:
        with deferring(self.queue):
            return super().forward_one_chunk(*arguments, **options)

    def backward_one_chunk(self, *arguments: Any, **options: Any) -> None:
        with deferring(self.queue):
            super().backward_one_chunk(*arguments, **options)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """What connects the neighbours (PyTorch 2.11): at the turn of the V a rank is its own, unknown to Gloo."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _later(self) -> Callable[[], None]:
        work, self.queue[:] = list(self.queue), []

        def compute() -> None:
            for accumulate in work:
                accumulate()

        return compute


class Pipeline:
    """One rank's stages and the schedule by which they work. Every method is collective over the axis.

    Args:
        stages: the modules of this rank by stage; each maps one tensor to one tensor.
        first_input: what the first stage is given for one micro-batch.
        activation: what every other is given, and what every one returns.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        plan: PipelinePlan,
        axis: Axis,
        first_input: Activation,
        activation: Activation,
        micro_batches: int,
        device: torch.device,
    ) -> None:
        self.stages, self.plan, self.axis, self.device = dict(stages), plan, axis, device
        stage_type = _SplitStage if plan.schedule == "zb" else PipelineStage
        built = []
        for index, module in self.stages.items():
            given = first_input if index == 0 else activation
            # Shapes are stated, so that no schedule runs the model to find them.
            built.append(
                stage_type(
                    _Unwrapped(module) if isinstance(module, FSDPModule) else module,
                    index,
                    plan.stages,
                    device,
                    input_args=_example(given, requires_grad=index > 0),
                    output_args=_example(activation, requires_grad=True),
                    group=axis.group,
                )
            )
        kind: Any = _SCHEDULES[plan.schedule]
        several = plan.schedule in ("interleaved", "zb")
        self._schedule = kind(built if several else built[0], micro_batches, loss_fn=self._loss_of, scale_grads=False)
        self._loss: Callable[[Tensor, Tensor], Tensor] | None = None  # of the step that runs
        self.micro_batches = micro_batches

    @property
    def has_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.plan.rank_of(self.plan.stages - 1) == self.axis.rank

    def forward_backward(
        self, inputs: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor], **shared: Any
    ) -> Tensor | None:
        """Gradients of the summed losses, added to those there are; that sum where it is computed, else None.

        Args:
            inputs: ``[micro-batches * batch, ...]``, read on the rank of the first stage.
            targets: the same of the targets, read on the rank of the last.
            loss: of the last stage's output and the targets of one micro-batch: a scalar.
            shared: what every stage is given by name: of tensors ``[micro-batches * batch, ...]`` its micro-batch's
                part, anything else as it is; no gradient flows to them.
        """
        self._loss = loss
        losses: list[Tensor] = []
        arguments = (inputs,) if 0 in self.stages else ()
        options: dict[str, Any] = {"target": targets, "losses": losses} if self.has_last else {}
        try:
            self._schedule.step(*arguments, return_outputs=False, **options, **shared)
        finally:
            self._loss = None
        return sum_of_losses([loss.detach() for loss in losses], self.axis) if self.has_last else None

    def _loss_of(self, output: Tensor, targets: Tensor) -> Tensor:
        assert self._loss is not None
        return self._loss(output, targets)

    def bubble(self, costs: Sequence[float]) -> float:
        """The share of time in which ranks wait, for stages of these costs; see ``bubble_fraction``."""
        return bubble_fraction(self.orders(), costs)

    def orders(self) -> dict[int, list[Work]]:
        """What each rank does, in order."""
        if self.plan.stages_per_rank == 1:
            return self.plan.single_stage_order(self.micro_batches)
        return {
            rank: [_work(str(action)) for action in order if action is not None]
            for rank, order in self._schedule.pipeline_order.items()
        }


def _work(action: str) -> Work:
    """``3F0`` -> F(orward) of stage 3 and micro-batch 0: what PyTorch prints, alike in all its versions."""
    found = re.fullmatch(r"(\d+)([FBIW])(\d+)", action)
    assert found is not None, action
    return found[2], int(found[1]), int(found[3])


def _example(activation: Activation, requires_grad: bool) -> Tensor:
    example = torch.empty(activation.shape, dtype=activation.dtype, device="meta")
    return example.requires_grad_(requires_grad and activation.dtype.is_floating_point)
