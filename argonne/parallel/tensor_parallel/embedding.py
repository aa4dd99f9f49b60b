"""The token embedding and the output head, shared out by vocabulary (arXiv 1909.08053, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.communication.regions import reduce_from_region, reduce_scatter_to_sequence_region
from argonne.parallel.sharding.initialisation import Initialiser, Normal
from argonne.parallel.sharding.region import Region, ShardSpec
from argonne.parallel.tensor_parallel.precision import Precision
from argonne.parallel.tensor_parallel.products import column_parallel_linear

ROW_MULTIPLE = 8
"""Rows of a rank's part are padded to this: bf16 matrix products want 16-byte aligned rows of logits."""


@dataclass(frozen=True)
class VocabularyRange:
    """The tokens ``start <= id < stop`` of one rank, kept in ``rows >= stop - start`` rows.

    Rows past ``stop - start`` are padding: zero for ever, no part of any softmax, never saved.
    """

    vocabulary: int
    start: int
    stop: int
    rows: int

    @classmethod
    def of_rank(cls, vocabulary: int, ranks: int, rank: int) -> VocabularyRange:
        """The part of ``rank``; every rank has the same number of rows, the last ones fewer tokens."""
        rows = -(-vocabulary // ranks)
        rows = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
        start = min(rank * rows, vocabulary)
        return cls(vocabulary, start, min(start + rows, vocabulary), rows)

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    def localise(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row numbers for ``ids`` (0 where another rank has the token), and where this rank has it."""
        mine = (ids >= self.start) & (ids < self.stop)
        return torch.where(mine, ids - self.start, 0), mine

    def spec(self, hidden: int, rank: int, initialiser: Initialiser) -> ShardSpec:
        """The spec of a ``[rows, hidden]`` weight."""
        if self.tokens == 0:
            return ShardSpec((), initialiser)
        region = Region(
            "weight",
            whole_shape=(self.vocabulary, hidden),
            start=(self.start, 0),
            shape=(self.tokens, hidden),
            local_start=(0, 0),
            holders=(rank,),
        )
        return ShardSpec((region,), initialiser)


class _VocabParallel(nn.Module):
    """A ``[vocabulary, hidden]`` weight cut into vocabulary ranges."""

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        groups: ProcessGroups,
        *,
        initialiser: Initialiser | None = None,
        precision: Precision = Precision(),
    ) -> None:
        super().__init__()
        self.axis = groups.tensor
        self.sequence_parallel = groups.sequence_parallel
        self.range = VocabularyRange.of_rank(vocabulary, self.axis.size, self.axis.rank)
        self.initialiser = initialiser or Normal(hidden**-0.5)
        self.precision = precision
        self.weight = nn.Parameter(torch.zeros(self.range.rows, hidden, dtype=precision.parameters))

    def shard_specs(self) -> dict[str, ShardSpec]:
        return {"weight": self.range.spec(self.weight.shape[1], self.axis.rank, self.initialiser)}

    def extra_repr(self) -> str:
        held = f"tokens {self.range.start}..{self.range.stop} in {self.range.rows} rows"
        return f"vocabulary={self.range.vocabulary}, hidden={self.weight.shape[1]}, {held}"


class VocabParallelEmbedding(_VocabParallel):
    """Token ids to vectors; each rank looks up its own tokens, and the sum over the ranks is the result.

    Args:
        vocabulary: number of tokens; it need not be divisible by anything.
        hidden: width of the vectors.
        groups: the processes; the weight is cut over ``groups.tensor``.
        initialiser: how the whole weight begins; default normal with std ``hidden ** -0.5``.
        precision: the dtypes.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids ``[...]`` -> ``[..., hidden]`` in the compute dtype, the same on every rank.

        Under sequence parallelism ``[tokens, ...]`` -> ``[tokens / ranks, ..., hidden]``.
        """
        rows, mine = self.range.localise(ids)
        vectors = F.embedding(rows, self.weight).to(self.precision.compute)
        leave = reduce_scatter_to_sequence_region if self.sequence_parallel else reduce_from_region
        return leave(vectors.masked_fill(~mine.unsqueeze(-1), 0), self.axis)


class VocabParallelHead(_VocabParallel):
    """Vectors to logits, column parallel by vocabulary; arguments as for ``VocabParallelEmbedding``."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` (the same on every rank) -> this rank's logits ``[..., range.tokens]``.

        Under sequence parallelism ``[tokens / ranks, ..., hidden]`` -> ``[tokens, ..., range.tokens]``.
        """
        return vocab_parallel_logits(x, self)


def vocab_parallel_logits(x: Tensor, holder: VocabParallelEmbedding | VocabParallelHead) -> Tensor:
    """This rank's logits of ``x``, as of ``VocabParallelHead.forward``.

    ``holder`` is the head, or the embedding when the two are tied.
    """
    logits = column_parallel_linear(x, holder.weight, None, holder.axis, holder.precision, holder.sequence_parallel)
    return logits[..., : holder.range.tokens]
