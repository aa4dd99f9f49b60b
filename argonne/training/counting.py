"""The memory that a computation needs, counted without using any: tensors that have a size and no numbers.

A CPU's memory cannot be tried out: Linux gives what it does not have, and ends a process that then uses it. So every
operator runs on PyTorch's fake tensors, which follow shapes and dtypes only, and what it makes is added up from then on
until it is freed. The count is the same on any machine; what an operator needs within itself is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
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
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self.see(made.untyped_storage())
        if self.live > self.limit:
            raise torch.OutOfMemoryError(f"{self.live:,} bytes of tensors are more than {self.limit:,.0f}")
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        """Count what a tensor lies in, at the size that it has now."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            reference, before = self._known[key]
        else:
            reference, before = weakref.ref(storage, lambda _: self._forget(key)), 0
        self._known[key] = reference, size
        self.live += size - before
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]


@contextmanager
def counted(limit: float = float("inf")) -> Iterator[Count]:
    """Within, tensors take no memory, and are counted up to ``limit`` bytes.

    A number that is asked of one is made up.

    Raises:
        torch.OutOfMemoryError: they would be more.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # its first use takes a second

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
        with FakeTensorMode(allow_non_fake_inputs=True), sizes_only(), count:
            yield count
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def _number(dtype: torch.dtype) -> bool | float | int:
    """A loss that is finite, no element that is not, the first of several, and a pipeline's vote (int32) for."""
    made_up = {torch.bool: False, torch.int32: 1, torch.int64: 0}
    return made_up.get(dtype, 1.0)
