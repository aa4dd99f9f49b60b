"""AdamW over a sharded model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from argonne.checkpoint import reset_moments
from argonne.parallel import ShardedParameter


def build_optimizer(
    parameters: Sequence[ShardedParameter], weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), fused; weight decay on matrices only, so on no norm and no bias."""
    matrices = [s.parameter for s in parameters if s.parameter.ndim >= 2]
    others = [s.parameter for s in parameters if s.parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=True)
    reset_moments(optimizer, parameters)
    return optimizer


def set_learning_rate(optimizer: torch.optim.AdamW, learning_rate: float) -> None:
    """The rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
