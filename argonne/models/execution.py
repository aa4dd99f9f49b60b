"""How a model is computed, whatever its shape: by which processes, in which dtypes, with which kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from argonne.kernels import Backend
from argonne.models.recompute import Recompute
from argonne.parallel import PipelinePlan, Precision, ProcessGroups


@dataclass(frozen=True)
class Execution:
    """What every layer of a model is given besides its shape."""

    groups: ProcessGroups
    """The processes that share the model and its work."""
    precision: Precision = Precision()  # noqa: RUF009 - frozen
    """The dtypes of parameters and of what is computed with them."""
    kernels: Backend = "auto"
    """What computes between the matrix products, and the loss: ``torch``, ``triton`` or ``auto`` (Triton on GPU)."""
    plan: PipelinePlan | None = None
    """The schedule of a pipeline and its stages, which lie along ``groups.pipeline``; None: ``1f1b``."""
    recompute: Recompute = Recompute.NONE
    """What backward computes again: less memory, more time."""

    compile: bool = False
    """Compute the blocks of a staged model compiled where they are trained (``compilation.py``)."""

    reproducible: int | None = None
    """Canonical blocks along the tensor axis, for the same bits at every layout (docs/reproducibility.md): the groups'
    sums are trees then, and ``groups`` says so (``ProcessGroups.in_blocks``). None: as ``groups`` has it."""

    def __post_init__(self) -> None:
        if self.reproducible is not None:
            object.__setattr__(self, "groups", self.groups.in_blocks(self.reproducible))

    def run(self, block: Callable[..., Tensor], x: Tensor, *inputs: object, number: int = 0) -> Tensor:
        """``block(x, *inputs)``, in backward computed again as this execution asks of the block of that number."""
        if not torch.is_grad_enabled():
            return block(x, *inputs)
        return self.recompute.run(number, block, x, *inputs)
