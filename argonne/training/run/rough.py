"""How much a step takes, told within milliseconds from the shapes of the model's parameters alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from argonne.models import Execution
from argonne.parallel import ProcessGroups
from argonne.training.config import RunConfig
from argonne.training.run.rehearsal import micro_batches
from argonne.training.run.setup import Workload

HEADS = 64
"""Of attention, at the most: of a model that does not say."""

WITHOUT_NUMBERS, EACH_WITHOUT_NUMBERS = 3e10, 3e8
"""FLOPs that a thread computes while PyTorch makes ready to follow tensors without numbers, and while it follows those
of two micro-batches that come of one parameter (``docs/log.md``)."""


@dataclass(frozen=True)
class Rough:
    """What can be said of a step without taking it."""

    most: float
    """A bound of its bytes, far too high; infinitely many where nothing is known."""
    is_quick: bool
    """It is sooner computed on a CPU than followed without numbers."""

    @classmethod
    def of(cls, config: RunConfig, workload: Workload, groups: ProcessGroups, size: int) -> Rough:
        """The step of micro-batches of ``size`` sequences on this rank.

        Of each parameter eight copies, and one more for each gradient that a tree of sums keeps; for each token eight
        times what all matrices take and give; the scores of all heads. What another loss than pretraining's holds, such
        as a teacher, nobody knows here.
        """
        if workload.loss.identity is not None:
            return cls(math.inf, is_quick=False)
        layout, precision, block_size = groups.layout, workload.precision, config.data.block_size
        plan = config.parallel.plan(layout)
        with torch.device("meta"):
            model = workload.model.build(Execution(groups, precision, config.training.kernels, plan))
        parameters = [sharded.parameter for sharded in model.sharded_parameters()]
        accumulation = config.training.gradient_accumulation_steps
        copies = 8 + accumulation.bit_length()
        state = copies * precision.parameters.itemsize * sum(parameter.numel() for parameter in parameters)
        widths = sum(sum(parameter.shape) for parameter in parameters if parameter.ndim > 1)
        count = micro_batches(config, groups, accumulation)
        at_once = size * block_size * (count if plan.ranks > 1 else 1)
        heads = workload.model.shape.get("num_attention_heads", HEADS)
        each = 8 * widths + 4 * heads * block_size
        flops = model.flops_per_token(block_size) * count * size * block_size
        own = flops / (layout.tensor * layout.pipeline * layout.context)
        limit = torch.get_num_threads() * (WITHOUT_NUMBERS + EACH_WITHOUT_NUMBERS * len(parameters))
        return cls(state + at_once * each * precision.parameters.itemsize, is_quick=own <= limit)
