"""Reading ahead: batches are prepared in a thread while the model computes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
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
        self._depth = depth
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="argonne-prefetch", daemon=True)
        self._thread.start()

    def get(self) -> T:
        """The next result; once those made before it are taken, the very exception that `source` raised."""
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            self.wait_seconds += time.perf_counter() - started
            if self._closed:
                raise RuntimeError("the prefetcher is closed")
            if self._error is not None and not self._ready:
                raise self._error
            self._changed.notify_all()
            return self._ready.popleft()

    def close(self) -> None:
        """Stop the thread and wait for the call it is in, if any; results not taken are dropped."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while self._wait_for_room():
                result = self._source()
                with self._changed:
                    self._ready.append(result)
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, the caller of get() must not wait for ever
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
            return not self._closed
