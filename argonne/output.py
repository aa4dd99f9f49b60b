"""Standard output and standard error that never end the program: what cannot be written is not worth a run."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any, TextIO, cast

from argonne.files import named


def steady_output() -> None:
    """From here on, nothing that is printed raises, whoever prints it: a reader that has gone away, a full disk, a
    stream that was closed, or a character that the locale does not know.

    The first thing that a stream loses is said on the other. What a full disk keeps out is tried again with the next
    line, as far as the stream's buffer reaches.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if not isinstance(stream, _Steady):
            setattr(sys, name, cast(TextIO, _Steady(stream or _nowhere(descriptor), name)))


def show(text: str, end: str = "\n") -> None:
    """Print a result: what the program was asked for, which is lost for nobody only if its reader has gone away.

    Raises:
        OSError: it could not be written.
    """
    stream = sys.stdout
    with contextlib.suppress(BrokenPipeError), named(Path("standard output")):
        print(text, end=end, file=stream.wrapped if isinstance(stream, _Steady) else stream, flush=True)


class _Steady:
    """A text stream whose writing never raises; in all else the stream that it is given."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.wrapped, self._name, self._told = stream, name, False
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        atexit.register(self._finish)

    def write(self, text: str) -> int:
        """Write ``text`` if that can be."""
        self._try(lambda: self.wrapped.write(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each of ``lines`` if that can be."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what was written if that can be."""
        self._try(self.wrapped.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def _try(self, action: Any) -> None:
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: UnicodeError, and "I/O operation on closed file"
            if self._told:
                return
            self._told = True
            other = sys.stderr if self._name == "stdout" else sys.stdout
            full = {"stdout": "standard output", "stderr": "standard error"}[self._name]
            with contextlib.suppress(OSError, ValueError):
                print(f"argonne: warning: {full}: {error}; going on without it", file=other, flush=True)

    def _finish(self) -> None:
        """The interpreter flushes once more when it ends, and its status would tell of a failure: there is none."""
        try:
            self.wrapped.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.wrapped.fileno())


def _nowhere(descriptor: int) -> TextIO:
    """For a stream that was closed before the program began; nothing else may come to be opened in its place."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        else:
            os.set_inheritable(descriptor, True)
    return open(os.devnull, "w", encoding="utf-8")
