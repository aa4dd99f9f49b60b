"""What a student learns from: a frozen teacher beside it, and the loss that has both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from argonne.models.build import ModelConfig, build_model
from argonne.models.contract import Batch, Head
from argonne.models.execution import Execution
from argonne.models.loss import CrossEntropyLoss
from argonne.models.staged import StagedModel
from argonne.parallel import (
    Axis,
    Distillation,
    DistillationSoftmax,
    ProcessGroups,
    Region,
    TeacherRows,
    VocabularyRange,
    vocab_parallel_linear_cross_entropy,
)


@dataclass(frozen=True)
class Teacher:
    """A model that is only asked for its last hidden values, and its output weight's rows of this rank's tokens."""

    model: StagedModel
    """Of one stage, and without a head of its own."""
    weight: Tensor
    """``[rows, hidden]``: of the rank's range of the student's vocabulary, those that are shared."""
    region: Region | None
    """Where these rows are in the whole output weight, if they are not rows of the model's own embedding."""
    first: int
    shared: int
    """As of ``TeacherRows``."""

    @classmethod
    def build(cls, config: ModelConfig, execution: Execution, student: VocabularyRange, shared: int) -> Teacher:
        """Allocate it, on the device that is current; the weights are still empty.

        Args:
            config: its shape.
            execution: how it is computed; its groups are ``teacher_groups``.
            student: this rank's range of the student's vocabulary.
            shared: the tokens ``0 <= id < shared`` are those that both models have.
        """
        model = build_model(config, execution)
        model.requires_grad_(False)
        head, first, stop = model.head, student.start, max(student.start, min(student.stop, shared))
        name = next(name for name, module in model.named_modules() if module is head) + ".weight"
        region = None
        if stop == first:
            weight = head.weight[:0]
        elif config.tie_word_embeddings and head.range.start <= first and stop <= head.range.stop:
            weight = head.weight[first - head.range.start : stop - head.range.start]
        else:  # the ranges of two vocabularies are not the same
            whole, shape = (head.range.vocabulary, head.weight.shape[1]), (stop - first, head.weight.shape[1])
            weight = torch.zeros(shape, dtype=head.weight.dtype)
            region = Region(name, whole, (first, 0), shape, (0, 0), (execution.groups.tensor.rank,))
        if not config.tie_word_embeddings:
            model.lm_head = model.stages[0].lm_head = None
        return cls(model, weight.detach(), region, first, shared)

    @torch.no_grad()
    def rows(self, batch: Batch) -> TeacherRows:
        """What it makes of a micro-batch, of which this rank has its context-parallel share of the positions."""
        whole = batch.ids.shape[-1] * self.model.groups.context.size
        given = self.model.given(replace(batch, draws=None)) | {"sequence": whole}
        return TeacherRows(self.model.stages[0](batch.ids, **given), self.weight, self.first, self.shared)


def teacher_groups(groups: ProcessGroups, *, sharded: bool) -> ProcessGroups:
    """The processes that compute a teacher where the last stage of a student is: each alone, or its tensor-parallel
    ranks together (``sharded``). Those that share a student's sequences share the teacher's.

    Its sums have no order of their own: a teacher that each computes alone has none over ranks.
    """
    tensor = groups.tensor if sharded else Axis("tensor", ranks=(groups.world.ranks[groups.world.rank],))
    layout = replace(groups.layout, tensor=tensor.size, pipeline=1, sequence_parallel=False)
    alone = replace(
        tensor, name="pipeline", size=1, rank=0, group=None, blocks=None, shared=None, sums=None, summation="fast"
    )
    return replace(groups, layout=layout, tensor=tensor, pipeline=alone)


@dataclass(frozen=True)
class DistillationLoss(CrossEntropyLoss):
    """The cross-entropy and the divergence from a teacher, as ``distillation`` weighs them; a ``LossFunction``.

    ``parts`` is given the sums of both. The objective and the kernels are pretraining's defaults.
    """

    distillation: Distillation = Distillation()  # noqa: RUF009 - frozen
    teacher: Teacher | None = None

    def _losses(
        self,
        hidden: Tensor,
        head: Head,
        batch: Batch,
        reduction: Literal["sum", "none"],
        parts: list[Tensor] | None = None,
    ) -> Tensor:
        assert self.teacher is not None
        arithmetic = DistillationSoftmax.beside(self.distillation, self.teacher.rows(batch))
        targets = batch.targets.flatten()
        return vocab_parallel_linear_cross_entropy(hidden, head, targets, self.objective, reduction, arithmetic, parts)
