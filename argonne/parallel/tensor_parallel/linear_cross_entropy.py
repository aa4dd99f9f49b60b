"""The output head and the cross-entropy in one: the logits never exist whole.

At a vocabulary of 151,665 the logits would be the largest tensor of a training step. They are made for some
tokens at a time, and turned into their part of the gradients before the next ones are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.recording import site
from argonne.parallel.communication.regions import copy_to_region, gather_from_sequence_region
from argonne.parallel.communication.tree import tree_sum
from argonne.parallel.errors import ArgonneError
from argonne.parallel.sizes_only import turns
from argonne.parallel.tensor_parallel.cross_entropy import (
    Arithmetic,
    Objective,
    ShardedSoftmax,
    gather_statistics,
    softmax_parts,
)
from argonne.parallel.tensor_parallel.embedding import VocabParallelEmbedding, VocabParallelHead, VocabularyRange
from argonne.parallel.tensor_parallel.gemm import product
from argonne.parallel.tensor_parallel.products import add_product

# Logits of a chunk, and its fewest tokens: enough for a good matrix product, small beside the whole.
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 28}
_FEWEST = 128
# Elements at a multiple of which a row of logits begins: a GPU multiplies, and loads 128 bits at a time, only so.
_ROW = {"cpu": 1, "cuda": 16}


class _ScaledLater(torch.autograd.Function):
    """``x``, whose gradient is multiplied by what ``scale`` holds by then: once it is summed over the axis.

    Before that, it would be multiplied in as many parts as there are ranks, and each would be rounded.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: list[Tensor]) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.scale.pop(), None


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses, with the gradients made on the way; or each loss, with a second pass in backward.

    ``sums`` are those of ``ShardedSoftmax.losses``: a token's highest logit, and the log of the sum of exponentials.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        vocabulary: VocabularyRange,
        axis: Axis,
        objective: Objective,
        reduction: str,
        trains: bool,
        arithmetic: Arithmetic,
        scale: list[Tensor] | None,
        parts_of_losses: list[Tensor] | None,
        copy: Tensor | None,
    ) -> Tensor:
        ctx.scale = scale
        ctx.vocabulary, ctx.axis, ctx.objective, ctx.reduction = vocabulary, axis, objective, reduction
        ctx.site, ctx.arithmetic = site(), arithmetic
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        used = (weight if copy is None else copy)[: vocabulary.tokens].to(x.dtype)
        used_bias = None if bias is None else bias[: vocabulary.tokens].to(x.dtype)
        parts = softmax_parts(arithmetic, targets, vocabulary, objective, axis)
        accurate = torch.promote_types(x.dtype, torch.float32)
        shapes = (), (parts[0][0].sums_of_a_token,)
        losses, sums = (x.new_empty(*shape, len(x), dtype=accurate) for shape in shapes)
        told = None
        if parts_of_losses is not None:
            parts_of_losses.append(told := losses.new_empty(len(parts[0][0].names), len(x)))
        gradients = _Gradients(ctx, x, weight, accurate) if trains and reduction == "sum" else None
        for chunk in _chunks(x, vocabulary, axis, parts[0][0].room):
            here = [(part[chunk], columns) for part, columns in parts]
            found = [part.statistics(_logits(x[chunk], used, used_bias, columns)) for part, columns in here]
            statistics = gather_statistics([own for own, _ in found], axis)
            losses[chunk], sums[:, chunk] = here[0][0].losses(statistics)
            if told is not None:
                told[:, chunk] = here[0][0].parts(statistics, sums[:, chunk])
            if gradients is not None:
                both = zip(here, found, strict=True)
                made = (part.gradient(saved, sums[:, chunk], None) for (part, _), (_, saved) in both)
                gradients.add(chunk, made, [columns for _, columns in here], x, used)
        if reduction == "none":
            ctx.save_for_backward(x, used, used_bias, targets, sums)
            return losses
        ctx.save_for_backward(*gradients.result() if gradients is not None else (None, None, None))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.reduction == "sum":
            # In place: the weight's is as large as the weight. A second backward is refused by autograd.
            of_x, *of_parameters = ctx.saved_tensors
            made = [None if g is None else g.mul_(gradient) for g in of_parameters]
            if of_x is not None and ctx.scale is None:
                of_x.mul_(gradient)
            elif of_x is not None:
                ctx.scale.append(gradient)
            return of_x, *made, *(None,) * 10
        x, used, used_bias, targets, sums = ctx.saved_tensors
        parts = softmax_parts(ctx.arithmetic, targets, ctx.vocabulary, ctx.objective, ctx.axis)
        gradients = _Gradients(ctx, x, used, sums.dtype, rows=ctx.vocabulary.rows)
        for chunk in _chunks(x, ctx.vocabulary, ctx.axis, parts[0][0].room):
            of_logits: list[Tensor] = []
            for part, columns in parts:
                saved = part[chunk].save(_logits(x[chunk], used, used_bias, columns), sums[:, chunk])
                of_logits.append(part[chunk].gradient(saved, sums[:, chunk], gradient[chunk]))
            gradients.add(chunk, of_logits, [columns for _, columns in parts], x, used)
        return *gradients.result(), *(None,) * 10


class _Gradients:
    """Those of x, of the weight and of the bias that are needed, filled chunk by chunk."""

    def __init__(self, ctx: Any, x: Tensor, weight: Tensor, accurate: torch.dtype, rows: int | None = None) -> None:
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        shape = (rows or weight.shape[0], weight.shape[1])
        self.weight_dtype, self.bias_dtype = ctx.weight_dtype, ctx.bias_dtype
        self.of_x = torch.empty_like(x) if needs_x else None
        self.of_weight = x.new_zeros(shape, dtype=accurate) if needs_weight else None
        self.of_bias = x.new_zeros(shape[:1], dtype=accurate) if needs_bias else None

    def add(self, chunk: slice, of_logits: Iterable[Tensor], columns: Sequence[slice], x: Tensor, used: Tensor) -> None:
        """What comes of the gradients of a chunk's logits, of all its columns or of those of each canonical block."""
        of_x = []
        for gradient, own in zip(of_logits, columns, strict=True):
            rounded = gradient.to(x.dtype)
            if self.of_x is not None:
                of_x.append(product(rounded, used[own].t()))
            if self.of_weight is not None:
                add_product(self.of_weight[own], rounded, x[chunk])
            if self.of_bias is not None:
                self.of_bias[own] += rounded.sum(0, dtype=self.of_bias.dtype)
        if self.of_x is not None:
            self.of_x[chunk] = tree_sum(of_x)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        of_weight = None if self.of_weight is None else self.of_weight.to(self.weight_dtype)
        return self.of_x, of_weight, None if self.of_bias is None else self.of_bias.to(self.bias_dtype)


def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    holder: VocabParallelEmbedding | VocabParallelHead,
    targets: Tensor,
    objective: Objective = Objective(),
    reduction: Literal["sum", "none"] = "sum",
    arithmetic: Arithmetic = ShardedSoftmax,
    parts: list[Tensor] | None = None,
) -> Tensor:
    """``vocab_parallel_cross_entropy`` of ``vocab_parallel_logits``, without ever holding all logits.

    Args:
        x: ``[tokens, hidden]`` in the compute dtype, the same on every rank; under sequence parallelism this
            rank's ``[tokens / ranks, hidden]``.
        holder: of the output weight: the head (its bias, if it has one, is counted), or the embedding when the two
            are tied.
        targets: ``[tokens]`` token ids, or ``objective.ignore_index``; of all tokens in either case.
        reduction: ``sum`` makes the gradients while it computes the loss (three matrix products in all);
            ``none`` lets every position have a weight of its own, for a fourth product in backward.
        arithmetic: how a rank's logits are computed with.
        parts: is given ``[objective.parts, tokens]``, what the loss of each position is the sum of.

    Returns:
        The sum over the positions that are not ignored, or each position's loss ``[tokens]``; in float32
        (float64 for float64), in nats, the same on every rank.

    Raises:
        ArgonneError: the shapes do not fit each other, or the reduction is not known.
    """
    if reduction not in ("sum", "none"):
        raise ArgonneError(f"reduction={reduction!r} is not known; legal: sum, none")
    tokens = len(x) * (holder.axis.size if holder.sequence_parallel else 1)
    if x.dim() != 2 or targets.shape != (tokens,):
        raise ArgonneError(
            f"x {list(x.shape)} and targets {list(targets.shape)} do not fit; legal: [tokens, hidden] (under sequence "
            "parallelism this rank's share of the tokens) and [tokens]"
        )
    enter = gather_from_sequence_region if holder.sequence_parallel else copy_to_region
    scale: list[Tensor] | None = [] if reduction == "sum" and holder.axis.blocks is not None else None
    if scale is not None:
        x = _ScaledLater.apply(x, scale)
    return _LinearCrossEntropy.apply(
        enter(x, holder.axis),
        holder.weight,
        holder.bias,
        targets,
        holder.range,
        holder.axis,
        objective,
        reduction,
        torch.is_grad_enabled(),
        arithmetic,
        scale,
        parts,
        holder.working.of(holder.weight),
    )


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, columns: slice) -> Tensor:
    """``x @ weight^T + bias`` of some columns; where the vocabulary asks for it, in rows that are a little apart."""
    weight, bias = weight[columns], None if bias is None else bias[columns]
    padding = -len(weight) % _ROW.get(x.device.type, 1)
    if not padding or torch.compiler.is_compiling():
        return product(x, weight, bias)
    out = x.new_empty(len(x), len(weight) + padding)[:, : len(weight)]
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _chunks(x: Tensor, vocabulary: VocabularyRange, axis: Axis, room: int) -> Iterator[slice]:
    """The same on every rank: each chunk has a collective. Of canonical blocks, the same at every number of ranks."""
    rows = vocabulary.rows * (1 if axis.blocks is None else axis.size)
    tokens = max(1, max(_FEWEST, _CHUNK.get(x.device.type, 1 << 28) // rows) // room)
    return (slice(start, start + tokens) for start in turns(range(0, len(x), tokens)))
