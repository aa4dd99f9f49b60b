"""The headers of Parquet pages, which carry no checksum and which pyarrow believes.

The Thrift compact protocol is read as far as page headers use it:
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md, and for the fields
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

_WINDOW = 1 << 16
# PageHeader: 3 compressed_page_size, 4 crc, 5 data_page_header, 8 data_page_header_v2.
_SIZE, _CRC, _V1, _V2 = 3, 4, 5, 8
# Both kinds of data page: 1 num_values. Version 2: 2 num_nulls, 6 repetition_levels_byte_length.
_VALUES, _NULLS, _REPETITION = 1, 2, 6


def page_fault(source: pa.NativeFile, start: int, rows: int, nulls: int) -> str:
    """What the page headers of a flat column chunk at `start` contradict, or an empty text.

    Raises:
        ValueError: there are no page headers there.
    """
    values = told = 0
    tells, checksums = True, set()
    while values < rows:
        header, length = _header(source, start)
        if header.get(_SIZE, -1) < 0:
            raise ValueError("a page header without a size")
        start += length + header[_SIZE]
        checksums.add(_CRC in header)
        page = header.get(_V2) or header.get(_V1) or {}
        values += page.get(_VALUES, 0)
        if _V1 in header:
            tells = False  # the first version does not say how many nulls there are
        elif _V2 in header:
            told += page.get(_NULLS, 0)
            if page.get(_REPETITION, 0):
                return "a page of repeated texts"
    if values != rows:
        return f"pages of {values:,} rows, not {rows:,}"
    if tells and told != nulls:
        return f"{nulls:,} null rows, not the {told:,} of its pages"
    return "pages with checksums and pages without" if len(checksums) > 1 else ""


def _header(source: pa.NativeFile, start: int) -> tuple[dict[int, Any], int]:
    """The header at `start` and its length; those that quote long texts as statistics are read in full."""
    left = source.size() - start
    for window in (_WINDOW, left):
        source.seek(start)
        data = source.read(min(window, left))
        try:
            return _struct(data, 0)
        except IndexError:
            continue
    raise ValueError("a page header that is cut off")


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        fields[number], at = _value(data, at, head & 15)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # a truth value is in its kind
        return kind == 1, at
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 8:
        length, at = _varint(data, at)
        if at + length > len(data):
            raise IndexError
        return data[at : at + length], at + length
    if kind == 12:
        return _struct(data, at)
    raise ValueError(f"a page header with a field of kind {kind}")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
