"""ZeRO stage 1: each replica has the optimizer's state of some rows of every parameter (arXiv 1910.02054)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from argonne.parallel.communication.collectives import Pending, start_all_gather
from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.communication.reduction import start_sum_and_scatter
from argonne.parallel.data_parallel.buckets import LateGradient, OverlappedReduction, gradient_dtype, plan_buckets
from argonne.parallel.data_parallel.leaves import LeafSums
from argonne.parallel.data_parallel.strategy import DataParallel, rows_of_a_full_rank, rows_of_rank
from argonne.parallel.errors import ArgonneError
from argonne.parallel.sharding.spec import ShardedParameter, narrow_rows


@dataclass(frozen=True)
class _BucketSlot:
    """Where a parameter lies in the buffer ``[replicas, width]`` of its bucket: row r is what rank r has of it."""

    whole: nn.Parameter
    own: nn.Parameter
    """This rank's rows: a view of ``whole``."""
    start: int
    width: int
    """Elements of a rank that has as many rows as any; where there are fewer, the rest is padding."""

    @property
    def own_columns(self) -> slice:
        return slice(self.start, self.start + self.own.numel())

    def pairs(self, buffer: Tensor, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of ``buffer`` with those of ``whole`` (contiguous) that belong there, as views."""
        flat = whole.view(-1)
        full = flat.numel() // self.width if self.width else 0
        yield buffer[:full, self.start : self.start + self.width], flat[: full * self.width].view(full, self.width)
        rest = flat[full * self.width :]
        if rest.numel():
            yield buffer[full, self.start : self.start + rest.numel()], rest


class ShardedOptimizer(DataParallel):
    """Whole parameters on every replica; each updates its own rows of them, and all gather what was updated.

    Gradients are reduce-scattered beside backward: as many bytes as an all-reduce, the other half of them
    when the new values are gathered. A whole gradient is freed when its bucket is sent.

    ``parameters`` are views of the model's: the model must not be moved or cast afterwards.

    Raises:
        ArgonneError: a parameter has no rows (it is a scalar), or is not contiguous.
    """

    def __init__(self, parameters: Sequence[ShardedParameter], groups: ProcessGroups, bucket_bytes: int) -> None:
        super().__init__([_own_rows(sharded, groups) for sharded in parameters], groups)
        if groups.reproducible:
            self.leaves = LeafSums.of(parameters)
        trained = [s.parameter for s in parameters if s.parameter.requires_grad]
        aliases = [alias for s in parameters for alias in s.trained[1:]]
        own = {
            id(whole): rows
            for s, o in zip(parameters, self.parameters, strict=True)
            for whole, rows in zip((s.parameter, *s.aliases), (o.parameter, *o.aliases), strict=True)
        }
        buckets = plan_buckets(trained, bucket_bytes)
        self._published = len(buckets)  # those of aliases lie where these do
        buckets += plan_buckets(aliases, bucket_bytes)
        self._buckets = [list(_slots(bucket, own, groups)) for bucket in buckets]
        self._widths = [sum(slot.width for slot in bucket) for bucket in self._buckets]
        self._reduction = OverlappedReduction(buckets, self._start)

    def begin(self, micro_batches: int, deferred: bool = False) -> None:
        super().begin(micro_batches, deferred)
        self._reduction.begin(micro_batches, deferred)
        for bucket in self._buckets:
            for slot in bucket:
                slot.whole.grad = None

    def complete(self) -> None:
        for bucket, summed in zip(self._buckets, self._reduction.finish(), strict=True):
            for slot in bucket:
                if slot.whole.grad is not None:
                    raise LateGradient
                slot.own.grad = summed[0, slot.own_columns].view(slot.own.shape)
        super().complete()

    @torch.no_grad()
    def publish(self) -> None:
        gathering: tuple[list[_BucketSlot], Pending] | None = None
        slots, widths = self._buckets[: self._published], self._widths[: self._published]
        for bucket, width in zip(reversed(slots), reversed(widths), strict=True):
            values = bucket[0].own.new_zeros(1, width)
            for slot in bucket:
                values[0, slot.own_columns] = slot.own.view(-1)
            started = (bucket, start_all_gather(values, self.groups.replicas))
            if gathering is not None:
                _spread(*gathering)
            gathering = started  # one is in flight while another is copied, and no more memory is taken
        if gathering is not None:
            _spread(*gathering)
        super().publish()

    def _start(self, number: int) -> Pending:
        bucket = self._buckets[number]
        whole = bucket[0].whole
        dtype = gradient_dtype(whole)
        buffer = torch.zeros(self.groups.replicas.size, self._widths[number], dtype=dtype, device=whole.device)
        for slot in bucket:
            if slot.whole.grad is not None:
                for there, part in slot.pairs(buffer, slot.whole.grad.contiguous()):
                    there.copy_(part)
                slot.whole.grad = None
        return start_sum_and_scatter(buffer, self.groups.replicas)


def _own_rows(sharded: ShardedParameter, groups: ProcessGroups) -> ShardedParameter:
    """This rank's rows of a parameter; one that is not trained stays whole on every replica."""
    whole = sharded.parameter
    if not whole.requires_grad:
        return sharded
    if whole.ndim == 0 or not whole.is_contiguous():
        raise ArgonneError(
            f"{sharded.name} of shape {list(whole.shape)} and strides {list(whole.stride())} cannot be cut into rows; "
            "legal: contiguous parameters of one dimension or more"
        )
    rows = rows_of_rank(len(whole), groups.replicas)
    own, *aliases = (_rows(parameter, rows) for parameter in (whole, *sharded.aliases))
    narrowed = narrow_rows(sharded, rows, own, (groups.replicas.rank,))
    return replace(narrowed, aliases=tuple(aliases))


def _rows(whole: nn.Parameter, rows: range) -> nn.Parameter:
    own = nn.Parameter(whole.data[rows.start : rows.stop])
    if gradient_dtype(whole) != whole.dtype:
        own.grad_dtype = gradient_dtype(whole)
    return own


def _slots(
    bucket: Sequence[nn.Parameter], own: dict[int, nn.Parameter], groups: ProcessGroups
) -> Iterator[_BucketSlot]:
    start = 0
    for whole in bucket:
        width = rows_of_a_full_rank(len(whole), groups.replicas) * math.prod(whole.shape[1:])
        yield _BucketSlot(whole, own[id(whole)], start, width)
        start += width


def _spread(bucket: list[_BucketSlot], gathered: Pending) -> None:
    """Copy what all replicas have updated into the whole parameters."""
    values = gathered.wait()
    for slot in bucket:
        for there, part in slot.pairs(values, slot.whole.data):
            part.copy_(there)
