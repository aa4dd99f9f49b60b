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
    """Write ``value`` and see it onto the disk; a reader finds the old file or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
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


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to the disk."""
    with named(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
