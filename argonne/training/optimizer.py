"""AdamW over a sharded model, its moments as parts of whole tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from argonne.checkpoint import Piece
from argonne.parallel import ShardedParameter

MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS = (0.9, 0.95)
"""How much of the means of gradients and of their squares a step keeps (GPT-3, arXiv 2005.14165)."""
EPSILON = 1e-8
"""Added to the root of the second, as in the paper of Adam (arXiv 1412.6980)."""


def build_optimizer(
    parameters: Sequence[ShardedParameter],
    weight_decay: float,
    betas: tuple[float, float] = BETAS,
    epsilon: float = EPSILON,
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), fused; weight decay on matrices only, so on no norm and no bias."""
    matrices = [s.parameter for s in parameters if s.parameter.ndim >= 2]
    others = [s.parameter for s in parameters if s.parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, fused=True)
    reset_moments(optimizer, parameters)
    return optimizer


def reset_moments(optimizer: torch.optim.AdamW, parameters: Sequence[ShardedParameter], step: int = 0) -> None:
    """Begin the moments at zero, as after ``step`` optimizer steps."""
    for sharded in parameters:
        parameter = sharded.parameter
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),
            **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
        }


def set_learning_rate(optimizer: torch.optim.AdamW, learning_rate: float) -> None:
    """The rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def moment_pieces(optimizer: torch.optim.AdamW, parameters: Sequence[ShardedParameter]) -> list[Piece]:
    """This rank's parts of the moments, named ``<whole tensor>.exp_avg`` and ``<whole tensor>.exp_avg_sq``."""
    return [
        Piece(f"{region.name}.{moment}", region, region.part_of(optimizer.state[sharded.parameter][moment]))
        for sharded in parameters
        for region in sharded.spec.regions
        if 0 not in region.shape
        for moment in MOMENTS
    ]
