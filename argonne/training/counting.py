"""The memory that a computation needs, counted operator by operator, where need be without using any.

A CPU's memory cannot be tried out: Linux gives what it does not have, and ends a process that then uses it. So what
every operator makes is added up until it is freed. Operators may run on PyTorch's fake tensors, which follow shapes and
dtypes only and take no memory. The count is the same on any machine, with numbers and without; what an operator needs
within itself is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from argonne.parallel.sizes_only import sizes_only


class Count(TorchDispatchMode):
    """The bytes of all tensors that exist, and the most that did at any time."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.limit = limit
        """Where the count is more, ``torch.OutOfMemoryError`` is raised."""
        self.live = self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return _number(args[0].dtype)
        if func is torch.ops.aten.equal.default:
            return False
        result = func(*args, **(kwargs or {}))
        for made in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(made, Tensor):
                self.see(made.untyped_storage())
        if self.live > self.limit:
            raise torch.OutOfMemoryError(f"{self.live:,} bytes of tensors are more than {self.limit:,.0f}")
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        """Count what a tensor lies in, at the size that it has now."""
        key, size = storage._cdata, storage.nbytes()
        reference, before = self._known.get(key, (None, 0))
        if reference is not None and size == before:
            return
        self._known[key] = reference or weakref.ref(storage, lambda _: self._forget(key)), size
        self.live += size - before
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]


@contextmanager
def counted(limit: float = float("inf"), computes: bool = False) -> Iterator[Count]:
    """Within, tensors are counted up to ``limit`` bytes.

    Args:
        limit: bytes.
        computes: they have numbers, and take the memory that is counted. A number that is asked of one is made up in
            either case.

    Raises:
        torch.OutOfMemoryError: they would be more.
    """
    count = Count(limit)
    resize = torch.UntypedStorage.resize_

    def resize_and_see(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        if storage._cdata in count._known:
            count.see(storage)
        return result

    # FSDP2 gives back what it has gathered so, past all operators.
    torch.UntypedStorage.resize_ = resize_and_see  # type: ignore[assignment, method-assign]
    try:
        with nullcontext() if computes else _without_numbers(), count:
            yield count
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


@contextmanager
def _without_numbers() -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensorMode  # its first use takes seconds

    with FakeTensorMode(allow_non_fake_inputs=True), sizes_only():
        yield


def _number(dtype: torch.dtype) -> bool | float | int:
    """A loss that is finite, no element that is not, the first of several, and a pipeline's vote (int32) for."""
    made_up = {torch.bool: False, torch.int32: 1, torch.int64: 0}
    return made_up.get(dtype, 1.0)
