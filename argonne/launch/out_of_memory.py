"""Memory that has run out: known by what allocators raise, and told in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from argonne.parallel.communication.environment import this_process
from argonne.parallel.errors import OutOfMemory

# What else than ``torch.OutOfMemoryError`` says so: PyTorch's CPU allocator, CUDA's driver and its libraries.
_WORDS = ("can't allocate memory", "out of memory", "alloc_failed")


def complaint(error: BaseException) -> BaseException | None:
    """The allocator's complaint behind ``error``, which may be the error itself, or what that was raised for.

    PyTorch's pipelines raise another of their own for what happens in a stage.
    """
    seen: BaseException | None = error
    while seen is not None and not _is_complaint(seen):
        seen = seen.__cause__ or seen.__context__
    return seen


def _is_complaint(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


@contextmanager
def told(what: Callable[[], str]) -> Iterator[None]:
    """Within, an allocator's complaint becomes an ``OutOfMemory`` that says ``what()``, and what would help.

    Raises:
        OutOfMemory: on this rank, perhaps alone.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (found := complaint(error)) is None:
            raise
        reason = (str(found).strip() or type(found).__name__).splitlines()[0][:160]
        message = f"memory ran out on rank {this_process().rank} {what()} ({reason})"
    else:
        return
    raise OutOfMemory(message)
