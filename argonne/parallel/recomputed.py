"""What is cheap to compute is computed again in backward, where it is read, instead of being kept (arXiv 2205.05198).

Within ``selectively(block, x)`` the results of each ``recomputed(function, ...)`` call, and what autograd keeps inside
it, are forgotten: backward calls the function once more, with the inputs that it had, when it first asks for one of
them. All else is kept as ever, the results of matrix products, attention and collectives among it, so that none of
these is repeated. Every number comes out of the operation that it would have come out of: no bit of a gradient changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Result = TypeVar("Result")


def selectively(block: Callable[..., Result], *inputs: Any) -> Result:
    """``block(*inputs)``, in which ``recomputed`` calls are forgotten until backward."""
    global _running
    outer, _running = _running, _Forgetting()
    try:
        with saved_tensors_hooks(_running.pack, _unpack):
            return block(*inputs)
    finally:
        _running.results.clear()
        _running = outer


def recomputed(function: Callable[..., Result], *inputs: Any) -> Result:
    """``function(*inputs)``; where a block runs ``selectively``, it is called again in backward.

    Args:
        function: makes the same tensor, or tuple of tensors, of the same inputs; without communication. It may read
            parameters, which must then be as they were.
        inputs: what it is a function of. Tensors among them are kept, unless a ``recomputed`` call has made them.
    """
    if torch.compiler.is_compiling() or _running is None:  # a compiler decides for itself what is cheap
        return function(*inputs)
    return _running.call(function, inputs)


class _Forgetting:
    """One pass of a block, forward."""

    def __init__(self) -> None:
        self.results: dict[int, tuple[_Call, int, Tensor]] = {}
        """What was made, by its storage: the call, its number among the call's results, and itself, so that no other
        storage lies there until the block ends."""

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """What is kept of a tensor that backward asks for."""
        found = self.results.get(_storage(tensor))
        if found is None:
            return tensor
        call, number, _ = found
        return _View(call, number, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def call(self, function: Callable[..., Result], inputs: Sequence[Any]) -> Result:
        global _running
        call = _Call(function, [self._kept(x) if isinstance(x, Tensor) else x for x in inputs])
        own = {_storage(x) for x in inputs if isinstance(x, Tensor)}
        outer, _running = _running, None  # calls within are a part of this one
        try:
            with saved_tensors_hooks(call.pack, _unpack):
                made = function(*inputs)
        finally:
            _running = outer
        for number, result in enumerate(_as_tuple(made)):
            if _storage(result) not in own:  # a view of an input is kept with that
                self.results.setdefault(_storage(result), (call, number, result))
        return made

    def _kept(self, x: Tensor) -> _Input:
        return _Input(self.pack(x.detach()), x.requires_grad)


@dataclass(frozen=True)
class _Input:
    """An argument of a call: kept, or made by another."""

    packed: Tensor | _View | _Inner
    trains: bool

    def tensor(self) -> Tensor:
        found = _unpack(self.packed).detach()
        return found.requires_grad_() if self.trains else found


class _Call:
    """A function and its inputs; its results, and what autograd keeps within it, once backward has asked for any."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Any]) -> None:
        self._function, self._inputs, self._count = function, inputs, 0
        self._results: tuple[Tensor, ...] = ()
        self._kept: list[Tensor] | None = None

    def pack(self, tensor: Tensor) -> _Inner:
        self._count += 1
        return _Inner(self, self._count - 1)

    def result(self, number: int) -> Tensor:
        self._require()
        return self._results[number]

    def kept(self, number: int) -> Tensor:
        return self._require()[number]

    def _require(self) -> list[Tensor]:
        if self._kept is None:
            kept: list[Tensor] = []
            inputs = [x.tensor() if isinstance(x, _Input) else x for x in self._inputs]
            with torch.enable_grad(), saved_tensors_hooks(lambda x: kept.append(x.detach()), _unpack):
                made = self._function(*inputs)
            if len(kept) != self._count:
                raise RuntimeError(f"{self._function} kept {self._count} tensors for backward, and now {len(kept)}")
            self._kept, self._results = kept, tuple(result.detach() for result in _as_tuple(made))
        return self._kept


@dataclass(frozen=True)
class _View:
    """A tensor in the storage of a call's result."""

    call: _Call
    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.call.result(self.number).as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class _Inner:
    """A tensor that autograd keeps within a call."""

    call: _Call
    number: int

    def tensor(self) -> Tensor:
        return self.call.kept(self.number)


_running: _Forgetting | None = None  # of the block that this process computes, forward


def _unpack(packed: Tensor | _View | _Inner) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.tensor()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _as_tuple(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)
