"""The memory that a stretch of code leaves behind: every storage that its operations made and that is still there."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Watches what is made within it.

    Args:
        known: tensors whose memory is counted elsewhere.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._made: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            before = self._made.get(storage._cdata)
            if storage._cdata not in self._known and (before is None or before[0].expired()):
                what = f"{tuple(tensor.shape)} {tensor.dtype} of {func}"
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), what)
        return result

    def left(self, beside: Tensor, expected: int) -> tuple[int, list[str]]:
        """The bytes that are still there, without those of ``beside``, and what they are of.

        Gloo's threads let go of what they have sent a little after it has arrived: more than ``expected`` is looked
        at again for a while.
        """
        for _ in range(200):
            found = self._left(beside)
            if found[0] <= expected:
                break
            time.sleep(0.01)
        return found

    def _left(self, beside: Tensor) -> tuple[int, list[str]]:
        own = beside.untyped_storage()._cdata
        living = [(size, what) for key, (ref, size, what) in self._made.items() if key != own and not ref.expired()]
        return sum(size for size, _ in living), [f"{size} B: {what}" for size, what in living]
