"""Cross-entropy over logits whose vocabulary is shared out over the tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from argonne.parallel.collectives import all_gather
from argonne.parallel.embedding import VocabularyRange
from argonne.parallel.errors import ArgonneError
from argonne.parallel.gemm import as_matrix
from argonne.parallel.groups import Axis

IGNORE_INDEX = -100
"""The target of a position that has no loss (the value that PyTorch uses)."""

# Logits taken at a time, so that scratch in float32 stays in a CPU's cache and small beside the logits.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 27}


@dataclass(frozen=True)
class Objective:
    """What is computed from the logits z of a position with target t, over the whole vocabulary of V tokens.

    With L = log(sum(exp(z))), the loss is (1 - s) * (L - z[t]) + s * (L - mean(z)) + w * L ** 2, where s is
    ``label_smoothing`` (Szegedy et al. 2016, as in PyTorch) and w is ``z_loss`` (PaLM, Chowdhery et al. 2022).
    """

    label_smoothing: float = 0.0
    """How much of the target's probability is spread evenly over all tokens, 0 to 1."""
    z_loss: float = 0.0
    """Weight of the square of L, which keeps the logits from drifting; 0 or more (PaLM: 1e-4)."""
    ignore_index: int = IGNORE_INDEX
    """Positions with this target have neither loss nor gradient."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ArgonneError(f"label_smoothing={self.label_smoothing} is not legal; legal: 0 to 1")
        if not self.z_loss >= 0:
            raise ArgonneError(f"z_loss={self.z_loss} is not legal; legal: 0 or more")


@dataclass
class Targets:
    """Targets ``[tokens]`` as one rank of the vocabulary sees them."""

    objective: Objective
    vocabulary: VocabularyRange
    rows: Tensor
    """The target's column among this rank's logits; 0 where another rank has it."""
    mine: Tensor
    counted: Tensor

    @classmethod
    def of(cls, targets: Tensor, vocabulary: VocabularyRange, objective: Objective) -> Targets:
        rows, mine = vocabulary.localise(targets)
        return cls(objective, vocabulary, rows, mine, targets != objective.ignore_index)

    def __getitem__(self, chunk: slice) -> Targets:
        return Targets(self.objective, self.vocabulary, self.rows[chunk], self.mine[chunk], self.counted[chunk])

    def statistics(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What this rank says of its logits ``values`` ``[tokens, its vocabulary]``, and their exponentials.

        Returns:
            ``[3 or 4, tokens]``: the maximum, the sum of exponentials above it, the target's logit, and the sum
            if it is needed; the exponentials above ``shift``; ``shift`` ``[tokens]``, the maximum made finite.
        """
        wants_sum = self.objective.label_smoothing > 0
        said = values.new_zeros(4 if wants_sum else 3, len(values))
        said[0] = said[2] = -torch.inf
        if not self.vocabulary.tokens:
            return said, values, said[1]
        said[2] = torch.where(self.mine, values.gather(1, self.rows[:, None])[:, 0], -torch.inf)
        if wants_sum:
            torch.sum(values, 1, out=said[3])
        shift = values.amax(1).clamp_(min=torch.finfo(values.dtype).min)  # a rank's logits may all be -inf
        exponentials = (values - shift[:, None]).exp_()
        said[0] = shift
        torch.sum(exponentials, 1, out=said[1])
        return said, exponentials, shift

    def losses(self, said: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and log(sum(exp(logits))) of each position, from every rank's ``[ranks, 3 or 4, tokens]``."""
        highest, total, target_logit = said[:, 0], said[:, 1], said[:, 2].amax(0)
        top = highest.amax(0)
        log_sum = top + ((highest - top).exp() * total).sum(0).log()
        smoothing, z_loss = self.objective.label_smoothing, self.objective.z_loss
        losses = log_sum - target_logit  # of a target that is no token: infinite
        if smoothing:
            mean = said[:, 3].sum(0) / self.vocabulary.vocabulary
            losses = (1 - smoothing) * losses + smoothing * (log_sum - mean)
        if z_loss:
            losses = losses + z_loss * log_sum.square()
        return torch.where(self.counted, losses, 0.0), log_sum

    def gradient(self, exponentials: Tensor, shift: Tensor, log_sum: Tensor, scale: Tensor | None) -> Tensor:
        """Overwrite ``exponentials`` above ``shift`` with the gradient of the logits; ``scale`` is the losses'."""
        smoothing, z_loss = self.objective.label_smoothing, self.objective.z_loss
        scale = torch.where(self.counted, torch.ones_like(log_sum) if scale is None else scale, 0.0)
        factor = (shift - log_sum).exp() * scale
        if z_loss:
            factor = factor * (1 + 2 * z_loss * log_sum)
        exponentials.mul_(factor[:, None])
        if smoothing:
            exponentials.sub_((scale * (smoothing / self.vocabulary.vocabulary))[:, None])
        if self.vocabulary.tokens:
            at_target = torch.where(self.mine, (smoothing - 1) * scale, 0.0)
            exponentials.scatter_add_(1, self.rows[:, None], at_target[:, None])
        return exponentials


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, vocabulary: VocabularyRange, axis: Axis, objective: Objective
    ) -> Any:
        local = Targets.of(targets, vocabulary, objective)
        accurate = torch.promote_types(logits.dtype, torch.float32)
        pieces = [local[chunk].statistics(logits[chunk].to(accurate))[0] for chunk in _chunks(logits)]
        said = torch.cat(pieces, 1) if pieces else logits.new_zeros(4, 0, dtype=accurate)
        losses, log_sum = local.losses(all_gather(said, axis))
        ctx.save_for_backward(logits, targets, log_sum)
        ctx.vocabulary, ctx.objective = vocabulary, objective
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, targets, log_sum = ctx.saved_tensors
        local = Targets.of(targets, ctx.vocabulary, ctx.objective)
        logits_gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for chunk in _chunks(logits):
            exponentials = (logits[chunk].to(log_sum.dtype) - log_sum[chunk, None]).exp_()
            total = log_sum[chunk]
            logits_gradient[chunk] = local[chunk].gradient(exponentials, total, total, gradient[chunk])
        return logits_gradient, None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    vocabulary: VocabularyRange,
    axis: Axis,
    objective: Objective = Objective(),
) -> Tensor:
    """The loss of each position, from this rank's part of the logits; the logits are left as they are.

    Args:
        logits: ``[..., vocabulary.tokens]``, this rank's part.
        targets: ``[...]`` token ids of the whole vocabulary, or ``objective.ignore_index``.
        vocabulary: this rank's range.
        axis: the ranks that share the vocabulary.
        objective: label smoothing, z-loss and the target that is ignored.

    Returns:
        ``[...]`` in float32 (float64 for float64 logits), in nats, the same on every rank.
    """
    losses = _VocabParallelCrossEntropy.apply(as_matrix(logits), targets.reshape(-1), vocabulary, axis, objective)
    return losses.view(targets.shape)


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK.get(logits.device.type, 1 << 27) // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)
