"""Files that are on the disk once written: whole, or as they were before."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"
"""Ends the name of what is not complete yet."""


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` and see it onto the disk; a reader finds the old file or the new one, never a part.

    Raises:
        ValueError: it holds a number that JSON has not, infinity say; nothing is written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        sync(temporary)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which then becomes ``path``; if the writing fails, nothing is left of it."""
    temporary = path.with_name(path.name + TEMPORARY)
    with named(path):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name ``path`` in an error of the file system that names no file: a full disk is told of by the descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON in UTF-8, is nested too deeply, or has a name twice in one object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
        return found

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to the disk."""
    with named(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
