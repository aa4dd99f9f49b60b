"""AdamW over a sharded model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from argonne.checkpoint import reset_moments
from argonne.parallel import ShardedParameter

BETAS = (0.9, 0.95)
"""How much of the means of gradients and of their squares a step keeps (GPT-3, arXiv 2005.14165)."""
EPSILON = 1e-8
"""Added to the root of the second, as in the paper of Adam (arXiv 1412.6980)."""


def build_optimizer(
    parameters: Sequence[ShardedParameter],
    weight_decay: float,
    betas: tuple[float, float] = BETAS,
    epsilon: float = EPSILON,
    *,
    pinned: bool = False,
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101); weight decay on matrices only, so on no norm and no bias.

    It is fused, unless each element is to have the same bits wherever it lies (``pinned``): PyTorch's fused step on a
    CPU rounds the last few of a tensor once less, where it multiplies and adds.
    """
    matrices = [s.parameter for s in parameters if s.parameter.ndim >= 2]
    others = [s.parameter for s in parameters if s.parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    one_by_one = pinned and parameters[0].parameter.device.type == "cpu"
    way = {"foreach": True} if one_by_one else {"fused": True}
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, **way)
    reset_moments(optimizer, parameters)
    return optimizer


def set_learning_rate(optimizer: torch.optim.AdamW, learning_rate: float) -> None:
    """The rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
