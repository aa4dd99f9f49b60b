"""Reading ahead: batches are prepared in a thread while the model computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from argonne.data.errors import DataError

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `source` in a thread and keeps at most `depth` results ready, in order.

    A state that belongs to a batch must travel in the batch: the source itself is ahead of what was taken.

    Raises:
        DataError: `depth` is less than 1.
    """

    def __init__(self, source: Callable[[], T], depth: int = 2) -> None:
        if depth < 1:
            raise DataError(f"prefetch depth={depth} is not a positive number of batches")
        self.wait_seconds = 0.0
        """Seconds that `get` has waited so far."""
        self._source = source
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="argonne-prefetch")
        self._ahead = deque(self._worker.submit(source) for _ in range(depth))

    def get(self) -> T:
        """The next result; once those made before it are taken, the very exception that `source` raised."""
        if not self._ahead:
            raise RuntimeError("the prefetcher is closed")
        started = time.perf_counter()
        try:
            result = self._ahead[0].result()  # what failed stays the next
        finally:
            self.wait_seconds += time.perf_counter() - started
        self._ahead.popleft()
        self._ahead.append(self._worker.submit(self._source))
        return result

    def close(self) -> None:
        """Stop the thread and wait for the call it is in, if any; results not taken are dropped."""
        self._ahead.clear()
        self._worker.shutdown(cancel_futures=True)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
