"""The gradients of a step's micro-batches, added up as leaves of one aligned tree and not as a chain.

A chain cut over replicas is another sum; a tree whose subtrees are the replicas' is the same. So a rank adds its
micro-batches as a binary counter does, and keeps at most log2(micro-batches) + 1 gradients of each parameter.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from argonne.parallel.communication.tree import TreeSum
from argonne.parallel.data_parallel.buckets import gradient_bytes
from argonne.parallel.errors import ArgonneError
from argonne.parallel.sharding.spec import ShardedParameter


class LeafSums:
    """Takes every parameter's gradient away after each backward pass, and puts back the sum after the last.

    Hooks of others on the same parameters, if they are registered later, then see that sum. ``gradient_bytes`` are
    those of one micro-batch's gradients on this rank.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], gradient_bytes: int) -> None:
        self._names: dict[int, str] = {}
        self.gradient_bytes = gradient_bytes
        self._sums: dict[int, TreeSum] = {}
        self._micro_batches = 0  # 0: not between begin and finish
        self._seen: dict[int, int] = {}
        took = functools.partial(_take, weakref.ref(self))
        for name, parameter in parameters:
            self._names[id(parameter)] = name
            self._sums[id(parameter)] = TreeSum()
            parameter.register_post_accumulate_grad_hook(took)

    @classmethod
    def of(cls, parameters: Iterable[ShardedParameter]) -> LeafSums:
        """Of all that backward makes gradients of."""
        trained = [(sharded.name, parameter) for sharded in parameters for parameter in sharded.trained]
        return cls(trained, sum(gradient_bytes(parameter) for _, parameter in trained))

    @staticmethod
    def most(micro_batches: int) -> int:
        """The most gradients of each parameter that are kept at once (closed form): log2(micro-batches) + 1."""
        return micro_batches.bit_length()

    def begin(self, micro_batches: int) -> None:
        """Expect so many backward passes from here."""
        self._micro_batches, self._seen = micro_batches, {}
        for sums in self._sums.values():
            sums.clear()

    def finish(self) -> None:
        """After the last.

        Raises:
            ArgonneError: a parameter had a gradient in some micro-batches only, whose place in the tree is not known.
        """
        expected, self._micro_batches = self._micro_batches, 0
        for key, seen in self._seen.items():
            if seen != expected:
                raise ArgonneError(
                    f"{self._names[key]} had a gradient in {seen} of {expected} micro-batches, which a reproducible "
                    "sum cannot place; legal: a gradient in each, or in none"
                )

    @torch.no_grad()
    def take(self, parameter: Tensor) -> None:
        """A backward pass, or what it has put off, has made the gradient of ``parameter``."""
        if not self._micro_batches or parameter.grad is None:
            return
        key = id(parameter)
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        self._sums[key].add(parameter.grad)
        parameter.grad = self._sums[key].total() if seen == self._micro_batches else None


def _take(sums: weakref.ref[LeafSums], parameter: Tensor) -> None:
    living = sums()
    if living is not None:
        living.take(parameter)
