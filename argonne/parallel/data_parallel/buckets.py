"""Gradients in buckets, each on its way to the other replicas while backward computes the rest."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from argonne.parallel.communication.collectives import Pending

BUCKET_BYTES = 25 * 2**20
"""Large enough to use a network well, small enough that the first is sent early; PyTorch's DDP has the same."""


def plan_buckets(parameters: Sequence[nn.Parameter], capacity: int) -> list[list[nn.Parameter]]:
    """Share out ``parameters``, last first as backward meets them, over buckets of ``capacity`` bytes of gradient.

    A bucket has one dtype of parameters and one of gradients. A parameter that is larger has one of its own.
    The buckets come in the order in which the last gradient of each is expected.
    """
    full: list[list[nn.Parameter]] = []
    filling: dict[tuple[torch.dtype, torch.dtype], list[nn.Parameter]] = {}
    for parameter in reversed(parameters):
        kind = (parameter.dtype, gradient_dtype(parameter))
        bucket = filling.setdefault(kind, [])
        if bucket and sum(map(gradient_bytes, bucket)) + gradient_bytes(parameter) > capacity:
            full.append(bucket)
            bucket = filling[kind] = []
        bucket.append(parameter)
    expected = {id(parameter): place for place, parameter in enumerate(reversed(parameters))}
    return sorted([*full, *filling.values()], key=lambda bucket: expected[id(bucket[-1])])


def gradient_dtype(parameter: nn.Parameter) -> torch.dtype:
    """The dtype in which the gradient of ``parameter`` is added up; it may be wider than the parameter's."""
    return parameter.grad_dtype or parameter.dtype


def gradient_bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * gradient_dtype(parameter).itemsize


class LateGradient(RuntimeError):
    """A gradient was added to after the sum over the replicas had begun, which does not have it."""

    def __init__(self) -> None:
        super().__init__(
            "a gradient was added to after its bucket was sent; legal: at most the backward passes that "
            "begin(micro_batches) was told of, and deferred=True where gradients are added later"
        )


class OverlappedReduction:
    """Starts the reduction of each bucket once backward has made its last gradient.

    Only the last micro-batch communicates. Bucket k is started after bucket k - 1 on every rank, whatever the
    order in which their gradients come, so that the replicas' collectives match. ``start`` begins that of a bucket.
    """

    def __init__(self, buckets: Sequence[Sequence[nn.Parameter]], start: Callable[[int], Pending]) -> None:
        self._buckets = buckets
        self._start = start
        self._micro_batches = 0  # 0: not between begin and finish
        self._deferred = False
        self.is_late = False
        """Whether backward has announced a gradient once more than it was to."""
        self._seen: dict[int, int] = {}
        self._missing: list[int] = []
        self._started: list[Pending] = []
        # Weakly: Python cannot see the way from a parameter over its hook to here, and would free none of it.
        announced = functools.partial(_announce, weakref.ref(self))
        for number, bucket in enumerate(buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(functools.partial(announced, number))

    def begin(self, micro_batches: int, deferred: bool) -> None:
        """Count from here: a gradient is there after ``micro_batches`` backward passes, or at the end if deferred."""
        if self._micro_batches:
            raise RuntimeError("begin() was called twice without complete() between")
        self._micro_batches = micro_batches
        self._deferred = deferred
        self.is_late = False
        self._seen = {}
        self._missing = [len(bucket) for bucket in self._buckets]
        self._started = []

    def finish(self) -> list[Tensor]:
        """Start what backward has not announced, and wait: the result of each bucket.

        Backward may not announce a gradient that a product added itself, and does not announce that of a
        parameter that was not used.
        """
        if not self._micro_batches:
            raise RuntimeError("complete() was called without begin()")
        self._micro_batches = 0
        while len(self._started) < len(self._buckets):
            self._start_next()
        results = [pending.wait() for pending in self._started]
        self._started = []
        return results

    def accumulated(self, number: int, parameter: Tensor) -> None:
        """Backward has added to the gradient of ``parameter``, which is in bucket ``number``."""
        if not self._micro_batches or self._deferred:
            return
        seen = self._seen[id(parameter)] = self._seen.get(id(parameter), 0) + 1
        self.is_late |= seen > self._micro_batches
        if seen != self._micro_batches:
            return
        self._missing[number] -= 1
        while len(self._started) < len(self._buckets) and not self._missing[len(self._started)]:
            self._start_next()

    @torch.no_grad()
    def _start_next(self) -> None:
        self._started.append(self._start(len(self._started)))


def _announce(reduction: weakref.ref[OverlappedReduction], number: int, parameter: Tensor) -> None:
    living = reduction()
    if living is not None:
        living.accumulated(number, parameter)
