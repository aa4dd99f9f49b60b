"""Muon (Keller Jordan, 2024): the momentum of a matrix, orthogonalised, is its step; AdamW does all other weights.

Each whole tensor (queries, keys, values, gate and up apart) is put together on one rank, orthogonalised there and
handed out again; its momentum stays where its weight is, so that a checkpoint has it as it has AdamW's moments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from argonne.checkpoint import MUON_MOMENT, reset_moments
from argonne.parallel import ProcessGroups, ShardedParameter
from argonne.parallel.sharding.wholes import ROUND_ELEMENTS, LocalPart, WholeTensors

MOMENTUM = 0.95
"""How much of the sum of gradients a step keeps (https://kellerjordan.github.io/posts/muon)."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic: steepest at zero, so that five iterations bring singular values to 0.7 .. 1.2 (the same page)."""
ITERATIONS = 5
EPSILON = 1e-7
"""The least norm that a matrix is divided by."""
UPDATE_RMS = 0.2
"""Of a step in units of the learning rate, about as AdamW's, whose rate and decay then serve (arXiv 2502.16982)."""


def orthogonalise(matrix: Tensor) -> Tensor:
    """``U V^T`` of ``matrix = U S V^T``, near enough, by Newton-Schulz iterations in the dtype of ``matrix``."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T.contiguous() if is_tall else matrix
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm.clamp_min(EPSILON)).to(matrix.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def cost(shape: tuple[int, ...]) -> float:
    """Of orthogonalising a matrix: multiply-adds of one of its larger products."""
    rows, columns = shape
    return float(rows * columns * min(rows, columns))


class Muon:
    """Muon over ``matrices``, some of the parameters that a rank holds, beside an AdamW over the rest of them.

    A matrix without a gradient counts as one with zeros: what a rank does must not depend on what it has used.

    Args:
        matrices: those that it orthogonalises: every part of each whole tensor, over the ranks of a stage together.
        adamw: what updates all others; its state has the momentum too.
        weight_decay: of the matrices.
        momentum: how much of the sum of gradients a step keeps.
        dtype: of the iterations.
        elements: of one owner's tensors that are on their way together.
    """

    def __init__(
        self,
        matrices: Sequence[ShardedParameter],
        adamw: torch.optim.AdamW,
        groups: ProcessGroups,
        weight_decay: float,
        momentum: float = MOMENTUM,
        dtype: torch.dtype = torch.float32,
        elements: int = ROUND_ELEMENTS,
    ) -> None:
        self.matrices, self._adamw = list(matrices), adamw
        self._own: dict[str, Any] = {
            "params": [sharded.parameter for sharded in matrices],
            "lr": 0.0,
            "weight_decay": weight_decay,
            "momentum": momentum,
        }
        reset_moments(self, self.matrices, moments=(MUON_MOMENT,))
        trained = [sharded for sharded in matrices if sharded.parameter.requires_grad]
        self.wholes = WholeTensors(trained, groups, cost, dtype, elements)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As of an optimizer of PyTorch."""
        return [self._own, *self._adamw.param_groups]

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """What is kept of each parameter: ``momentum_buffer``, or AdamW's moments; and ``step``, the steps taken."""
        return self._adamw.state

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._adamw.zero_grad()
        for sharded in self.matrices:
            sharded.parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter (collective over a stage)."""
        for sharded in self.matrices:
            self.state[sharded.parameter]["step"] += 1
        self.wholes.map(self._direction, orthogonalise, self._update, beside=self._adamw.step)

    def _direction(self, part: LocalPart) -> Tensor:
        """Add the gradient to the momentum, and look one step ahead of it (Nesterov)."""
        # Sums and products apart, each rounded once, so that no element's bits depend on where it lies.
        parameter, momentum = part.sharded.parameter, self._own["momentum"]
        total = part.of(self.state[parameter][MUON_MOMENT]).mul_(momentum)
        if parameter.grad is not None:
            total.add_(part.of(parameter.grad))
        ahead = total * momentum
        if parameter.grad is not None:
            ahead.add_(part.of(parameter.grad))
        return ahead.to(self.wholes.dtype)

    def _update(self, part: LocalPart, direction: Tensor) -> None:
        weight, rate = part.of(part.sharded.parameter.data), self._own["lr"]
        scale = UPDATE_RMS * max(part.region.whole_shape) ** 0.5
        weight.mul_(1 - rate * self._own["weight_decay"]).sub_(direction.to(weight.dtype) * (rate * scale))
