"""Cross-entropy over logits whose vocabulary is shared out over the tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from argonne.parallel.communication.collectives import all_gather
from argonne.parallel.communication.groups import Axis
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_number, require_share
from argonne.parallel.tensor_parallel.embedding import VocabularyRange
from argonne.parallel.tensor_parallel.gemm import as_matrix

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

    @property
    def parts(self) -> tuple[str, ...]:
        """What the loss is the sum of, if it is more than the cross-entropy L - z[t].

        ``label_smoothing`` is what the smoothing adds to that, s * (z[t] - mean(z)); ``z_loss`` is w * L ** 2.
        """
        added = [name for name in ("label_smoothing", "z_loss") if getattr(self, name)]
        return ("cross_entropy", *added) if added else ()

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each of ``parts`` in the loss, which is their sum."""
        return (1.0,) * len(self.parts)

    def __post_init__(self) -> None:
        require_share("label_smoothing", self.label_smoothing)
        require_number("z_loss", self.z_loss, zero=True)


@dataclass(frozen=True)
class SavedLogits:
    """What is left of a rank's logits ``[tokens, its vocabulary]`` for the gradient, which may overwrite it."""

    values: Tensor
    """The logits, or their exponentials."""
    shift: Tensor | None = None
    """``[tokens]`` above which the exponentials are; None if the values are logits."""


@dataclass
class ShardedSoftmax:
    """The softmax of logits whose vocabulary is shared out, against its targets: one rank's part of the arithmetic.

    A subclass may compute in another way (``argonne.kernels`` does, on a GPU).
    """

    ids: Tensor
    """The targets ``[tokens]``: of the whole vocabulary, or ``ignore_index``."""
    vocabulary: VocabularyRange
    """The rank's."""
    objective: Objective

    sums_of_a_token: ClassVar[int] = 2
    """What ``losses`` tells of a token's softmax."""
    room: ClassVar[int] = 1
    """How many times the memory it takes for a logit that pretraining takes, at the most."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of what ``parts`` tells."""
        return self.objective.parts

    def __getitem__(self, chunk: slice) -> ShardedSoftmax:
        return replace(self, ids=self.ids[chunk])

    @property
    def counted(self) -> Tensor:
        """Which positions have a loss."""
        return self.ids != self.objective.ignore_index

    def statistics(self, logits: Tensor) -> tuple[Tensor, SavedLogits]:
        """What the loss needs of this rank's logits ``[tokens, its vocabulary]``, and what is left of them.

        Returns:
            ``[3 or 4, tokens]``: the maximum (made finite), the sum of exponentials above it, the target's logit,
            and the sum if it is needed.
        """
        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wants_sum = self.objective.label_smoothing > 0
        found = values.new_zeros(4 if wants_sum else 3, len(values))
        found[0] = found[2] = -torch.inf
        if not self.vocabulary.tokens:
            return found, SavedLogits(values, found[1])
        column, mine = self.vocabulary.localise(self.ids)
        found[2] = torch.where(mine, values.gather(1, column[:, None])[:, 0], -torch.inf)
        if wants_sum:
            torch.sum(values, 1, out=found[3])
        shift = values.amax(1).clamp_(min=torch.finfo(values.dtype).min)  # a rank's logits may all be -inf
        exponentials = (values - shift[:, None]).exp_()
        found[0] = shift
        torch.sum(exponentials, 1, out=found[1])
        return found, SavedLogits(exponentials, shift)

    def losses(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each position, from ``[ranks or blocks, 3 or 4, tokens]`` of all, and the softmax's ``sums``.

        Those are ``[2, tokens]``: the highest logit, and the log of the sum of exponentials above it. They are kept
        apart, and the loss is a difference of logits first: so it does not suffer when all logits are large.
        """
        highest, total, target_logit = statistics[:, 0], statistics[:, 1], statistics[:, 2].amax(0)
        top = highest.amax(0)
        log_total = ((highest - top).exp() * total).sum(0).log()
        smoothing, z_loss = self.objective.label_smoothing, self.objective.z_loss
        losses = (top - target_logit) + log_total  # of a target that is no token: infinite
        if smoothing:
            mean = statistics[:, 3].sum(0) / self.vocabulary.vocabulary
            losses = (1 - smoothing) * losses + smoothing * ((top - mean) + log_total)
        if z_loss:
            losses = losses + z_loss * (top + log_total).square()
        return torch.where(self.counted, losses, 0.0), torch.stack((top, log_total))

    def parts(self, statistics: Tensor, sums: Tensor) -> Tensor:
        """What the loss of each position is the sum of, ``[objective.parts, tokens]``, from what ``losses`` had."""
        (top, log_total), target_logit = sums, statistics[:, 2].amax(0)
        found = [(top - target_logit) + log_total]
        if smoothing := self.objective.label_smoothing:
            found.append(smoothing * (target_logit - statistics[:, 3].sum(0) / self.vocabulary.vocabulary))
        if z_loss := self.objective.z_loss:
            found.append(z_loss * (top + log_total).square())
        return torch.where(self.counted, torch.stack(found), 0.0)

    def save(self, logits: Tensor, sums: Tensor) -> SavedLogits:
        """As ``statistics`` saves it, when the ``sums`` are known."""
        return SavedLogits((logits.to(sums.dtype) - sums[0, :, None]).exp_(), sums[0])

    def gradient(self, saved: SavedLogits, sums: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
        """The gradient of the logits, in ``out`` or in place of what was saved; ``scale`` is the losses'."""
        assert saved.shift is not None
        smoothing, exponentials = self.objective.label_smoothing, saved.values
        scale, factor = self.factors(sums, scale)
        exponentials.mul_(((saved.shift - sums[0] - sums[1]).exp() * factor)[:, None])
        if smoothing:
            exponentials.sub_((scale * (smoothing / self.vocabulary.vocabulary))[:, None])
        if self.vocabulary.tokens:
            column, mine = self.vocabulary.localise(self.ids)
            at_target = torch.where(mine, (smoothing - 1) * scale, 0.0)
            exponentials.scatter_add_(1, column[:, None], at_target[:, None])
        return exponentials if out is None else out.copy_(exponentials)

    def factors(self, sums: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the losses of the positions are multiplied by, 0 where there is none, and their softmax ``[tokens]``."""
        scale = torch.where(self.counted, torch.ones_like(sums[0]) if scale is None else scale, 0.0)
        z_loss = self.objective.z_loss
        return scale, scale * (1 + 2 * z_loss * (sums[0] + sums[1])) if z_loss else scale


Arithmetic = Callable[[Tensor, VocabularyRange, Objective], ShardedSoftmax]
"""How a rank's logits are computed with: ``ShardedSoftmax``, or what makes one of its kind."""


def softmax_parts(
    arithmetic: Arithmetic, ids: Tensor, vocabulary: VocabularyRange, objective: Objective, axis: Axis
) -> list[tuple[ShardedSoftmax, slice]]:
    """A rank's part of the softmax with its columns, or the parts of its canonical blocks, if ``axis`` has such.

    What is combined of blocks (maxima, sums) does not depend on which rank has them.
    """
    count = axis.own_blocks
    blocks, rows = vocabulary.blocks(count), vocabulary.rows // count
    columns = [slice(number * rows, number * rows + block.tokens) for number, block in enumerate(blocks)]
    return [(arithmetic(ids, block, objective), own) for block, own in zip(blocks, columns, strict=True)]


def gather_statistics(found: Sequence[Tensor], axis: Axis) -> Tensor:
    """``[3 or 4, tokens]`` of each of this rank's parts -> those of all parts of all ranks, in order."""
    return all_gather(found[0], axis) if len(found) == 1 else all_gather(torch.stack(list(found)), axis).flatten(0, 1)


def columns_of(logits: Tensor, columns: slice) -> Tensor:
    """Some columns of ``[tokens, vocabulary]``, as a matrix of their own where they are not all."""
    return logits if columns == slice(0, logits.shape[1]) else logits[:, columns].contiguous()


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        vocabulary: VocabularyRange,
        axis: Axis,
        objective: Objective,
        arithmetic: Arithmetic,
        parts_of_losses: list[Tensor] | None,
    ) -> Any:
        parts = softmax_parts(arithmetic, targets, vocabulary, objective, axis)
        found = []
        for part, columns in parts:
            pieces = [part[chunk].statistics(columns_of(logits[chunk], columns))[0] for chunk in _chunks(logits)]
            found.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1))
        statistics = gather_statistics(found, axis)
        losses, sums = parts[0][0].losses(statistics)
        if parts_of_losses is not None:
            parts_of_losses.append(parts[0][0].parts(statistics, sums))
        ctx.save_for_backward(logits, targets, sums)
        ctx.vocabulary, ctx.objective, ctx.axis, ctx.arithmetic = vocabulary, objective, axis, arithmetic
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, targets, sums = ctx.saved_tensors
        parts = softmax_parts(ctx.arithmetic, targets, ctx.vocabulary, ctx.objective, ctx.axis)
        logits_gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for chunk in _chunks(logits):
            for part, columns in parts:
                here, out = part[chunk], logits_gradient[chunk][:, columns]
                saved = here.save(columns_of(logits[chunk], columns), sums[:, chunk])
                here.gradient(saved, sums[:, chunk], gradient[chunk], out=out)
        return logits_gradient, *(None,) * 6


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    vocabulary: VocabularyRange,
    axis: Axis,
    objective: Objective = Objective(),
    arithmetic: Arithmetic = ShardedSoftmax,
    parts: list[Tensor] | None = None,
) -> Tensor:
    """The loss of each position, from this rank's part of the logits; the logits are left as they are.

    Args:
        logits: ``[..., vocabulary.tokens]``, this rank's part.
        targets: ``[...]`` token ids of the whole vocabulary, or ``objective.ignore_index``.
        arithmetic: how a rank's logits are computed with.
        parts: is given ``[objective.parts, tokens]``, what the loss of each position is the sum of.

    Returns:
        ``[...]`` in float32 (float64 for float64 logits), in nats, the same on every rank.

    Raises:
        ArgonneError: the shapes do not fit each other.
    """
    if logits.shape != (*targets.shape, vocabulary.tokens):
        raise ArgonneError(
            f"logits {list(logits.shape)} and targets {list(targets.shape)} do not fit; legal: [..., "
            f"{vocabulary.tokens}] and [...], of all tokens"
        )
    flat = as_matrix(logits), targets.reshape(-1)
    losses = _VocabParallelCrossEntropy.apply(*flat, vocabulary, axis, objective, arithmetic, parts)
    return losses.view(targets.shape)


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK.get(logits.device.type, 1 << 27) // max(1, logits.shape[1]))
    for start in range(0, max(1, logits.shape[0]), rows):  # no row at all is a chunk too
        yield slice(start, start + rows)
