"""JSON lines: where row groups begin and end in a stream of lines, and what the lines say.

A row group is the lines that begin in one stretch of ``GROUP_BYTES`` of the (decompressed) file, so that where it lies
follows from its number alone. A line of white space is no row. Any other is one, whatever is wrong with it: what cannot
be read is ``BROKEN``, and shifts no row behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from argonne.data.errors import BROKEN

GROUP_BYTES = 1 << 20
"""Small enough for each lane to hold a row group of its own."""
BLOCK_BYTES = 1 << 18
"""Read at a time."""
BOM = "\ufeff"
_NEWLINE = ord("\n")
_SPACE = b" \t\r\n"

Column = str | tuple[str, ...]
"""The column whose texts are the rows; or several of any type, of which each row is a ``dict``."""


class Lines:
    """The lines of one row group as they are in the file, each parsed when it is asked for.

    Args:
        data: whole lines; the last may have no newline.
        column: what the rows are.
    """

    def __init__(self, data: bytes, column: Column) -> None:
        self._data, self._column = data, column
        self._starts, self._ends = _bounds(data)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return len(self._data) + self._starts.nbytes + self._ends.nbytes

    def rows(self, first: int, end: int) -> list[object]:
        """The rows from ``first`` to ``end``: texts (None where a line has none), or dicts; or ``BROKEN``."""
        return [self._row(number) for number in range(first, min(end, len(self)))]

    def names(self, number: int) -> list[str]:
        """What the object of one line has, for a message."""
        value = self._value(number)
        return list(value) if isinstance(value, dict) else []

    def _row(self, number: int) -> object:
        value = self._value(number)
        if not isinstance(value, dict):
            return BROKEN
        if isinstance(self._column, str):
            text = value.get(self._column)
            return text if isinstance(text, str) and _encodable(text) else None
        found = {name: value[name] for name in self._column if name in value}
        return found if _encodable(found) else BROKEN

    def _value(self, number: int) -> object:
        try:
            # Some writers begin a file with a byte order mark, and files are joined to one.
            return json.loads(self._data[self._starts[number] : self._ends[number]].decode().removeprefix(BOM))
        except (ValueError, RecursionError):  # also what is no UTF-8, and a number of thousands of digits
            return BROKEN


def groups(source: pa.NativeFile, number: int = 0, begin: int = 0) -> Iterator[bytes]:
    """The bytes of each row group from ``number`` on, whose first line is at ``begin``, where ``source`` stands.

    Where a line is longer than a row group, those that no line begins in are empty.
    """
    held = bytearray()
    ended = False
    while True:
        if not held:
            held += source.read(BLOCK_BYTES)
            if not held:
                return
        # The last line that begins before the end of the stretch ends with the first newline from here on.
        look, cut = max((number + 1) * GROUP_BYTES - 1 - begin, 0), 0
        if begin < (number + 1) * GROUP_BYTES:
            while (newline := held.find(_NEWLINE, look)) < 0 and not ended:
                look = max(look, len(held))
                block = source.read(BLOCK_BYTES)
                held += block
                ended = not block
            cut = newline + 1 or len(held)
        yield bytes(memoryview(held)[:cut])
        del held[:cut]
        begin, number = begin + cut, number + 1


def group_at(source: pa.NativeFile, number: int) -> bytes:
    """The bytes of one row group of an uncompressed file; empty where no line begins in it."""
    begin = 0
    if number:
        source.seek(number * GROUP_BYTES - 1)
        # The newline before the first line that begins here, if one does.
        newline = source.read(GROUP_BYTES).find(b"\n")
        if newline < 0:
            return b""
        begin = number * GROUP_BYTES + newline
    source.seek(begin)
    return next(groups(source, number, begin), b"")


def _bounds(data: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each line begins and ends that is not white space alone."""
    codes = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(codes == _NEWLINE)
    if data and codes[-1] != _NEWLINE:
        ends = np.append(ends, len(data))
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])[: len(ends)]
    doubtful = np.flatnonzero(np.isin(codes[starts], list(_SPACE)))
    blank = [line for line in doubtful if not data[starts[line] : ends[line]].strip(_SPACE)]
    return (np.delete(starts, blank), np.delete(ends, blank)) if blank else (starts, ends)


def _encodable(value: object) -> bool:
    """Whether all texts in it are Unicode: JSON can write half of a surrogate pair, which no encoding has."""
    if isinstance(value, str):
        if value.isascii():
            return True
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, dict):
        return all(_encodable(each) for pair in value.items() for each in pair)
    return not isinstance(value, list) or all(map(_encodable, value))
