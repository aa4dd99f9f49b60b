"""What updates a sharded model: AdamW, or Muon for the matrices of its blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from argonne.checkpoint import MOMENTS, MUON_MOMENT, Piece, moment_pieces, reset_moments
from argonne.checkpoint.pieces import KeepsMoments
from argonne.parallel import ArgonneError, ProcessGroups, ShardedParameter
from argonne.parallel.communication.collectives import gather_objects
from argonne.training.muon import MOMENTUM, Muon

BETAS = (0.9, 0.95)
"""How much of the means of gradients and of their squares a step keeps (GPT-3, arXiv 2005.14165)."""
EPSILON = 1e-8
"""Added to the root of the second, as in the paper of Adam (arXiv 1412.6980)."""


class Optimizer(KeepsMoments, Protocol):
    """What a step asks of one; any of PyTorch's is one. ``state`` of a parameter has ``step``, the updates so far."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def step(self) -> Any: ...
    def zero_grad(self) -> None: ...


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
    groups = [group for group in groups if group["params"]] or groups
    one_by_one = pinned and all(s.parameter.device.type == "cpu" for s in parameters)
    way = {"foreach": True} if one_by_one else {"fused": True}
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, **way)
    reset_moments(optimizer, parameters)
    return optimizer


def build_muon(
    parameters: Sequence[ShardedParameter],
    groups: ProcessGroups,
    weight_decay: float,
    betas: tuple[float, float] = BETAS,
    epsilon: float = EPSILON,
    *,
    momentum: float = MOMENTUM,
    dtype: torch.dtype | None = None,
    pinned: bool = False,
) -> Muon:
    """Muon for the matrices of blocks, whose decay is theirs too, and ``build_optimizer`` for the rest (collective).

    Args:
        parameters: those of a model's replicas (``replicas_of``), which know which are matrices of blocks.
        weight_decay: of matrices.
        betas: of AdamW.
        epsilon: of AdamW.
        momentum: of Muon.
        dtype: of Muon's iterations; None: that of the parameters.
        pinned: as of ``build_optimizer``.

    Raises:
        ArgonneError: no rank has a matrix of a block.
    """
    matrices = [sharded for sharded in parameters if sharded.is_block_matrix]
    require_matrices(any(gather_objects(bool(matrices), groups.world)), "these parameters")
    others = [sharded for sharded in parameters if not sharded.is_block_matrix]
    adamw = build_optimizer(others, weight_decay, betas, epsilon, pinned=pinned)
    return Muon(matrices, adamw, groups, weight_decay, momentum, dtype or parameters[0].parameter.dtype)


def require_matrices(has_some: bool, what: str) -> None:
    """Raise ``ArgonneError`` for a model, or ``what`` is called so, that Muon has nothing to do for."""
    if not has_some:
        raise ArgonneError(
            f"optimizer='muon' finds no matrices of blocks in {what}; legal: adamw, or a model whose `blocks` have "
            "weights of two dimensions"
        )


def moments_of(optimizer: Optimizer, parameters: Sequence[ShardedParameter]) -> list[Piece]:
    """This rank's parts of all that the optimizer keeps of each element."""
    by_muon = [sharded for sharded in parameters if MUON_MOMENT in optimizer.state[sharded.parameter]]
    others = [sharded for sharded in parameters if MUON_MOMENT not in optimizer.state[sharded.parameter]]
    return moment_pieces(optimizer, others, MOMENTS) + moment_pieces(optimizer, by_muon, [MUON_MOMENT])


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """The rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
