"""Files that are on the disk once written: whole, or as they were before."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

TEMPORARY = ".tmp"
"""Ends the name of what is not complete yet."""
SET_ASIDE = ".set-aside"
"""Ends the name of what a run keeps but does not go by."""
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` and see it onto the disk; a reader finds the old file or the new one, never a part.

    Raises:
        ValueError: it holds a number that JSON has not, infinity say; nothing is written.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """``write_json`` for any text; bytes that were read with ``surrogateescape`` are written as they were."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
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


def read_object(path: Path) -> dict[str, Any]:
    """``read_json`` of a file that must hold an object. Raises ``ValueError`` when it does not."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def seal(content: Any) -> str:
    """SHA-256 (hex) of what JSON values say, in whatever order their names are."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to the disk."""
    with named(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(file: IO[str]) -> bool:
    """Whether this process has the file to itself, until it is closed; it has where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def make_directory(path: Path) -> None:
    """Make a directory and those it is in, where they are missing, and see their names onto the disk."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def set_aside(path: Path, ending: str = SET_ASIDE) -> Path:
    """Rename ``path`` to a name of its own that nothing has yet, and return that."""
    aside, number = path.with_name(path.name + ending), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}{ending}-{number}")
    os.replace(path, aside)
    return aside


def exchange(first: Path, second: Path) -> bool:
    """Let two files or directories change names at one blow. False where this system or its disk cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # not Linux, or an older C library
        return False
    return renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0
