"""Files that are on the disk once written: whole, or as they were before."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"
"""Ends the name of what is not complete yet."""


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` and see it onto the disk; a reader finds the old file or the new one, never a part."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    sync(temporary)
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
