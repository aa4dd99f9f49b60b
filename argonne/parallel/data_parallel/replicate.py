"""Plain data parallelism: every replica has all parameters and all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from argonne.parallel.communication.collectives import Pending
from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.communication.reduction import start_sum
from argonne.parallel.data_parallel.buckets import LateGradient, OverlappedReduction, gradient_dtype, plan_buckets
from argonne.parallel.data_parallel.leaves import LeafSums
from argonne.parallel.data_parallel.strategy import DataParallel
from argonne.parallel.sharding.spec import ShardedParameter


class Replicate(DataParallel):
    """Each gradient is summed over the replicas, in all-reduces that run beside backward.

    The gradients are views of their bucket's buffer, so that nothing is copied.
    """

    def __init__(self, parameters: Sequence[ShardedParameter], groups: ProcessGroups, bucket_bytes: int) -> None:
        super().__init__(parameters, groups)
        if groups.reproducible:
            self.leaves = LeafSums.of(parameters)
        trained = [s.parameter for s in parameters if s.parameter.requires_grad]
        aliases = [alias for s in parameters for alias in s.trained[1:]]
        self._buckets = plan_buckets(trained, bucket_bytes) + plan_buckets(aliases, bucket_bytes)
        self._buffers: list[Tensor] = []
        self._sent: list[int] = []  # the version of each buffer when it was sent
        self._views: list[list[Tensor]] = []
        self._reduction = OverlappedReduction(self._buckets, self._start)

    def begin(self, micro_batches: int, deferred: bool = False) -> None:
        self._reduction.begin(micro_batches, deferred)
        if not self._buffers:
            for bucket in self._buckets:
                sizes = [parameter.numel() for parameter in bucket]
                buffer = torch.empty(sum(sizes), dtype=gradient_dtype(bucket[0]), device=bucket[0].device)
                self._buffers.append(buffer)
                self._sent.append(0)
                self._views.append([part.view(p.shape) for p, part in zip(bucket, buffer.split(sizes), strict=True)])
        for bucket, buffer, views in zip(self._buckets, self._buffers, self._views, strict=True):
            buffer.zero_()
            for parameter, view in zip(bucket, views, strict=True):
                parameter.grad = view if self.leaves is None else None
        if self.leaves is not None:
            self.leaves.begin(micro_batches)

    def complete(self) -> None:
        self._reduction.finish()
        if any(buffer._version != sent for buffer, sent in zip(self._buffers, self._sent, strict=True)):
            raise LateGradient
        super().complete()

    def _start(self, number: int) -> Pending:
        for parameter, view in zip(self._buckets[number], self._views[number], strict=True):
            if parameter.grad is not view:  # someone has replaced or cleared it
                view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
                parameter.grad = view
        pending = start_sum(self._buffers[number], self.groups.replicas)
        self._sent[number] = self._buffers[number]._version
        return pending
