"""Where a step is taken for the sizes of its tensors alone, a loop of many equal turns need not take them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_depth = 0  # of the blocks of ``sizes_only`` in this process


@contextmanager
def sizes_only() -> Iterator[None]:
    """Within, nobody reads a number: memory is counted, and ``turns`` are few."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_sizes_only() -> bool:
    """Whether tensors have no numbers, and lie nowhere."""
    return _depth > 0


def turns(pieces: Iterable[T]) -> Iterator[T]:
    """What a loop goes over whose turns keep nothing, and but for the last take the same memory: all ``pieces``.

    Where only sizes matter, the first two, which find what the one before has left, and the last.
    """
    if not _depth:
        yield from pieces
        return
    all_of_them = list(pieces)
    yield from all_of_them[:2]
    yield from all_of_them[2:][-1:]
