"""Cross-entropy, of logits and of hidden values, over a vocabulary that may be shared out."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from argonne.kernels.dispatch import Backend, refuse, uses_triton
from argonne.parallel.communication.groups import Axis
from argonne.parallel.tensor_parallel.cross_entropy import Objective, ShardedSoftmax, vocab_parallel_cross_entropy
from argonne.parallel.tensor_parallel.embedding import VocabParallelEmbedding, VocabParallelHead, VocabularyRange
from argonne.parallel.tensor_parallel.linear_cross_entropy import vocab_parallel_linear_cross_entropy


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    objective: Objective = Objective(),
    *,
    vocabulary: VocabularyRange | None = None,
    axis: Axis = Axis("none"),
    backend: Backend = "auto",
    parts: list[Tensor] | None = None,
) -> Tensor:
    """The loss in nats of each position; the logits are left as they are.

    Args:
        logits: ``[..., tokens of the vocabulary]``, all or this rank's part.
        targets: ``[...]`` token ids of the whole vocabulary, or ``objective.ignore_index``.
        vocabulary: this rank's range, when the vocabulary is shared out.
        parts: is given ``[objective.parts, positions]``, what each loss is the sum of.

    Returns:
        ``[...]`` in float32 (float64 for float64 logits), the same on every rank.

    Raises:
        KernelError: the shapes do not fit, or the backend cannot compute them.
    """
    if logits.dim() == 0 or targets.shape != logits.shape[:-1]:
        refuse("targets", list(targets.shape), f"{list(logits.shape[:-1])} as the logits' positions")
    if vocabulary is None:
        if axis.size > 1:
            refuse("vocabulary", None, f"the range of this rank, one of {axis.size}")
        vocabulary = VocabularyRange.of_rank(logits.shape[-1], 1, 0)
    if logits.shape[-1] != vocabulary.tokens:
        refuse("logits", list(logits.shape), f"[..., {vocabulary.tokens}], the tokens of the vocabulary's range")
    arithmetic = arithmetic_of(backend, logits=logits)
    return vocab_parallel_cross_entropy(logits, targets, vocabulary, axis, objective, arithmetic, parts)


def linear_cross_entropy(
    x: Tensor,
    holder: VocabParallelEmbedding | VocabParallelHead,
    targets: Tensor,
    objective: Objective = Objective(),
    reduction: Literal["sum", "none"] = "sum",
    *,
    backend: Backend = "auto",
    parts: list[Tensor] | None = None,
) -> Tensor:
    """``cross_entropy`` of the output head's logits, which never exist whole.

    Arguments, result and errors are ``argonne.parallel.vocab_parallel_linear_cross_entropy``'s, and ``backend``.
    """
    arithmetic = arithmetic_of(backend, x=x)
    return vocab_parallel_linear_cross_entropy(x, holder, targets, objective, reduction, arithmetic, parts)


def arithmetic_of(backend: Backend, **tensors: Tensor) -> type[ShardedSoftmax]:
    """How a backend computes with a rank's logits."""
    if not uses_triton(backend, **tensors):
        return ShardedSoftmax
    from argonne.kernels.gpu.cross_entropy import TritonSoftmax

    return TritonSoftmax
