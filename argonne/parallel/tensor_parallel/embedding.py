"""The token embedding and the output head, shared out by vocabulary (arXiv 1909.08053, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argonne.parallel.communication.groups import Axis, ProcessGroups
from argonne.parallel.communication.regions import (
    gather_from_region,
    reduce_from_region,
    reduce_scatter_to_sequence_region,
)
from argonne.parallel.errors import ArgonneError
from argonne.parallel.sharding.initialisation import Initialiser, Normal
from argonne.parallel.sharding.partition import Partition
from argonne.parallel.sharding.placement import Placement
from argonne.parallel.sharding.region import Region, ShardSpec
from argonne.parallel.sharding.uses import Uses
from argonne.parallel.tensor_parallel.blocks import Block, Cut
from argonne.parallel.tensor_parallel.linear import bias_initialiser_of
from argonne.parallel.tensor_parallel.precision import Precision
from argonne.parallel.tensor_parallel.products import column_parallel_linear
from argonne.parallel.tensor_parallel.working_copy import WorkingCopy

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
    def of_rank(cls, vocabulary: int, ranks: int, rank: int, blocks: int | None = None) -> VocabularyRange:
        """The part of ``rank``; every rank has the same number of rows, the last ones fewer tokens.

        With canonical ``blocks`` of the vocabulary (a multiple of ``ranks``) it is cut between them.
        """
        rows = -(-vocabulary // (blocks or ranks))
        rows = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE * ((blocks or ranks) // ranks)
        start = min(rank * rows, vocabulary)
        return cls(vocabulary, start, min(start + rows, vocabulary), rows)

    def blocks(self, count: int) -> list[VocabularyRange]:
        """Itself, in ``count`` parts with as many rows each."""
        rows = self.rows // count
        starts = [min(self.start + number * rows, self.stop) for number in range(count)]
        return [VocabularyRange(self.vocabulary, start, min(start + rows, self.stop), rows) for start in starts]

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    def cut(self, axis: Axis) -> tuple[Block, ...]:
        """The rows of each canonical block of ``axis`` that this rank has; none in fast mode."""
        if axis.blocks is None:
            return ()
        rows = self.rows // axis.own_blocks
        return tuple((range(number * rows, (number + 1) * rows),) for number in range(axis.own_blocks))

    def localise(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row numbers for ``ids`` (0 where another rank has the token), and where this rank has it."""
        mine = (ids >= self.start) & (ids < self.stop)
        return torch.where(mine, ids - self.start, 0), mine

    def spec(self, name: str, tail: tuple[int, ...], rank: int, initialiser: Initialiser) -> ShardSpec:
        """The spec of a parameter ``[rows, *tail]`` that is cut like the vocabulary."""
        held = range(self.start, self.stop)
        regions = (Region.slab(name, (self.vocabulary, *tail), 0, held, (rank,)),) if held else ()
        return ShardSpec(regions, initialiser, is_table=True)


class _VocabParallel(nn.Module):
    """A ``[vocabulary, hidden]`` weight cut into vocabulary ranges."""

    multiplies = True
    """Whether it is made for products: those of a head."""

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
        self.range = VocabularyRange.of_rank(vocabulary, self.axis.size, self.axis.rank, self.axis.blocks)
        self.cut = Cut(outputs=self.range.cut(self.axis))
        self.initialiser = initialiser or Normal(hidden**-0.5)
        self.precision, self.working = precision, WorkingCopy(precision, at_once=self.multiplies)
        self.weight = nn.Parameter(torch.zeros(self.range.rows, hidden, dtype=precision.parameters))
        self.bias: nn.Parameter | None = None

    def shard_specs(self) -> dict[str, ShardSpec]:
        return {"weight": self.range.spec("weight", (self.weight.shape[1],), self.axis.rank, self.initialiser)}

    def extra_repr(self) -> str:
        held = f"tokens {self.range.start}..{self.range.stop} in {self.range.rows} rows"
        return f"vocabulary={self.range.vocabulary}, hidden={self.weight.shape[1]}, {held}"


class VocabParallelEmbedding(_VocabParallel):
    """Token ids to vectors; each rank looks up its own tokens, and the sum over the ranks is the result.

    Args:
        vocabulary: number of tokens; it need not be divisible by anything.
        groups: the processes; the weight is cut over ``groups.tensor``.
        initialiser: how the whole weight begins; default normal with std ``hidden ** -0.5``.
    """

    multiplies = False
    _uses: Uses | None = None

    def separate_lookup(self) -> None:
        """Sum the gradients of the lookup apart from those of a tied head, which a pipeline has on another stage."""
        self._uses = Uses(1)

    def uses_apart(self) -> dict[str, Uses]:
        return {} if self._uses is None else {"weight": self._uses}

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids ``[...]`` -> ``[..., hidden]`` in the compute dtype, the same on every rank.

        Under sequence parallelism ``[tokens, ...]`` -> ``[tokens / ranks, ..., hidden]``.
        """
        if self.sequence_parallel and ids.ndim < 1:
            raise ArgonneError("a single id cannot be shared out under sequence parallelism; legal: [tokens, ...]")
        rows, mine = self.range.localise(ids)
        (weight,) = (self.weight,) if self._uses is None else self._uses.of(self.weight)
        vectors = F.embedding(rows, weight).to(self.precision.compute)
        leave = reduce_scatter_to_sequence_region if self.sequence_parallel else reduce_from_region
        return leave(vectors.masked_fill(~mine.unsqueeze(-1), 0), self.axis)

    def output_placement(self) -> Placement:
        return Placement(shares_tokens=self.sequence_parallel)


class VocabParallelHead(_VocabParallel):
    """Vectors to logits, column parallel by vocabulary.

    Args:
        vocabulary: number of tokens; it need not be divisible by anything.
        groups: the processes; weight and bias are cut over ``groups.tensor``.
        bias: add a bias, cut like the vocabulary.
        gather_output: ``forward`` returns the logits of all tokens on every rank instead of this rank's; the losses
            of a vocabulary that is shared out take the latter.
        initialiser: how the whole weight begins; default normal with std ``hidden ** -0.5``.
        bias_initialiser: how the whole bias begins; default zero.

    Raises:
        ArgonneError: ``bias_initialiser`` is given without ``bias``.
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        groups: ProcessGroups,
        *,
        bias: bool = False,
        gather_output: bool = False,
        initialiser: Initialiser | None = None,
        bias_initialiser: Initialiser | None = None,
        precision: Precision = Precision(),
    ) -> None:
        super().__init__(vocabulary, hidden, groups, initialiser=initialiser, precision=precision)
        self.gather_output = gather_output
        self.bias_initialiser = bias_initialiser_of(bias, bias_initialiser)
        self.bias = nn.Parameter(torch.zeros(self.range.rows, dtype=precision.parameters)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` (the same on every rank) -> this rank's logits ``[..., range.tokens]``, or all if gathered.

        Under sequence parallelism ``[tokens / ranks, ..., hidden]`` -> ``[tokens, ..., range.tokens]``.
        """
        if not self.gather_output:
            return vocab_parallel_logits(x, self)
        # Every rank has as many rows, and only the last ones padding, which the joined logits end with.
        return gather_from_region(_logits_of_rows(x, self), self.axis)[..., : self.range.vocabulary]

    def output_placement(self) -> Placement:
        if self.gather_output:
            return Placement()
        axis, vocabulary = self.axis, self.range.vocabulary
        ranges = (VocabularyRange.of_rank(vocabulary, axis.size, rank, axis.blocks) for rank in range(axis.size))
        return Placement((Partition("", 1, tuple(range(each.start, each.stop) for each in ranges)),))

    def shard_specs(self) -> dict[str, ShardSpec]:
        specs = super().shard_specs()
        if self.bias is not None:
            specs["bias"] = self.range.spec("bias", (), self.axis.rank, self.bias_initialiser)
        return specs


def vocab_parallel_logits(x: Tensor, holder: VocabParallelEmbedding | VocabParallelHead) -> Tensor:
    """This rank's logits of ``x``, as of ``VocabParallelHead.forward`` without ``gather_output``.

    ``holder`` is the head, or the embedding when the two are tied.
    """
    return _logits_of_rows(x, holder)[..., : holder.range.tokens]


def _logits_of_rows(x: Tensor, holder: VocabParallelEmbedding | VocabParallelHead) -> Tensor:
    """Those of padding too."""
    weight, bias, copy = holder.weight, holder.bias, holder.working.of(holder.weight)
    return column_parallel_linear(
        x, weight, bias, holder.axis, holder.precision, holder.sequence_parallel, holder.cut, copy
    )
