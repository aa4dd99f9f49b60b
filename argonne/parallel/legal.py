"""What a number from outside may be: its type, its bounds, and that it is finite; and where may be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from argonne.parallel.errors import ArgonneError

MOST = 2**31 - 1
"""The largest size or count that is taken: products of two of them still fit 64 bits."""

LARGEST = 3.4e38
"""The largest number that is taken: about the largest of float32."""


def require_whole(name: str, value: Any, least: int, most: int = MOST) -> None:
    """Raise ``ArgonneError`` unless ``value`` is an ``int`` (no ``bool``) from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgonneError(f"{name}={value!r} is not legal; legal: a whole number, {least} or more")
    if value < least:
        raise ArgonneError(f"{name}={value} is not legal; legal: {least} or more")
    if value > most:
        raise ArgonneError(f"{name}={value} is not legal; legal: {least} to {most}")


def require_number(name: str, value: Any, zero: bool = False) -> None:
    """Raise ``ArgonneError`` unless ``value`` is a finite number (no ``bool``) above 0, or 0 itself if ``zero``."""
    legal = "0 or more" if zero else "more than 0"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgonneError(f"{name}={value!r} is not legal; legal: a number, {legal}")
    if not (value > 0 or (zero and value == 0)):  # nan too
        raise ArgonneError(f"{name}={value} is not legal; legal: {legal}")
    if value > LARGEST:
        raise ArgonneError(f"{name}={value} is not legal; legal: {legal}, at most {LARGEST}")


def require_share(name: str, value: Any) -> None:
    """Raise ``ArgonneError`` unless ``value`` is a number (no ``bool``) from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:  # nan too
        raise ArgonneError(f"{name}={value!r} is not legal; legal: a number, 0 to 1")


def require_directory(name: str, path: Path) -> None:
    """Raise ``ArgonneError`` unless ``path`` is a directory that this user may write, or can be made as one."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ArgonneError(f"{name}={str(path)!r} cannot be made: {str(existing)!r} is not a directory")
    if not os.access(existing, os.W_OK):
        raise ArgonneError(f"{name}={str(path)!r} cannot be written; legal: a directory that this user may write")
