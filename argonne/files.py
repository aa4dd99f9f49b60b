"""Files that are on the disk once written: whole, or as they were before."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"
"""Ends the name of what is not complete yet."""
SET_ASIDE = ".set-aside"
"""Ends the name of what a run keeps but does not go by."""
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` and see it onto the disk; a reader finds the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """``write_json`` for any text; bytes that were read with ``surrogateescape`` are written as they were."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    sync(temporary)
    os.replace(temporary, path)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ``OSError`` or ``ValueError``, which say in one line what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
