"""Files that only grow, ``metrics.jsonl`` and ``samples.md``: no full disk leaves a torn line or a hole in them."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from argonne.files import named, replacing

WAITING = 20_000
"""Pieces that are kept while they cannot be written; then the oldest go."""

_LONGEST = 1 << 20  # bytes of a line that are held in memory: garbage may have no ends of lines
_BLOCK = 1 << 20


class AppendedFile:
    """A file that grows by whole pieces; what cannot be written now is written with the next piece that can."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[bytes] = deque(maxlen=WAITING)
        self._whole: int | None = None  # up to here, when what follows was cut short

    def append(self, text: str) -> None:
        """Write ``text`` behind all that was appended before.

        Raises:
            OSError: naming the file, when it cannot be written; the text waits.
        """
        self._waiting.append(text.encode("utf-8", "backslashreplace"))
        size = self.path.stat().st_size if self.path.exists() else 0
        self._whole = size if self._whole is None else min(size, self._whole)
        try:
            with named(self.path), self.path.open("ab", buffering=0) as file:
                if size > self._whole:
                    file.truncate(self._whole)
                rest = memoryview(b"".join(self._waiting))
                while rest:
                    rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):  # at the next piece, if not now
                os.truncate(self.path, self._whole)
            raise
        self._whole = None
        self._waiting.clear()

    def keep(self, wanted: Callable[[bytes], bool]) -> bool:
        """Drop every line of which ``wanted``, called once for each in their order, says no; whether there were any.

        In one pass and in bounded memory. Usually they are the last, and are cut off where they lie.
        """
        if not self.path.exists():
            return False
        gone: list[tuple[int, int]] = []  # from, to: neighbours are one
        end, line = 0, b"\n"
        with self.path.open("rb") as file:
            while piece := file.readline(_LONGEST):
                start, end = end, end + len(piece)
                if wanted(piece):
                    line = piece
                elif gone and gone[-1][1] == start:
                    gone[-1] = gone[-1][0], end
                else:
                    gone.append((start, end))
        if gone and gone[-1][1] == end:
            os.truncate(self.path, gone[-1][0])
        holes = [span for span in gone if span[1] < end]
        if holes:
            self._without(holes)
        if not line.endswith(b"\n"):
            with named(self.path), self.path.open("ab") as file:
                file.write(b"\n")
        return bool(gone)

    def _without(self, holes: list[tuple[int, int]]) -> None:
        with replacing(self.path) as temporary, self.path.open("rb") as file, temporary.open("wb") as kept:
            start = 0
            for until, after in holes:
                file.seek(start)
                for left in range(until - start, 0, -_BLOCK):
                    kept.write(file.read(min(left, _BLOCK)))
                start = after
            file.seek(start)
            shutil.copyfileobj(file, kept, _BLOCK)
