"""Columns of any type as rows, from Arrow's arrays, which are checked before an offset in them is followed."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from argonne.data.errors import BROKEN

# Columns that hold text, and the same bytes without the promise that they are UTF-8. Some writers leave the
# promise out: their columns are binary, and read as text too.
BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
    **{kind: kind for kind in (pa.binary(), pa.large_binary(), pa.binary_view())},
}


class Records:
    """Rows of several columns, checked and not yet decoded to Python."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        for batch in batches:
            for array in batch.columns:
                as_bytes(array).validate(full=True)
        self._batches = batches

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, or mapped."""
        return sum(batch.nbytes for batch in self._batches)

    def rows(self, first: int, end: int) -> list[object]:
        """The rows from `first` to `end`, each a dict; `BROKEN` where one has a text that is no valid UTF-8."""
        found: list[object] = []
        begin = 0
        for batch in self._batches:
            if begin < end and first < begin + batch.num_rows:
                start = max(first - begin, 0)
                found += _records(batch.slice(start, end - begin - start))
            begin += batch.num_rows
        return found


def as_bytes(array: pa.Array) -> pa.Array:
    """The same without the promise that texts are UTF-8, in columns that are nested too."""
    if isinstance(array, pa.DictionaryArray):
        values = array.dictionary.view(_without_promise(array.dictionary.type))
        return pa.DictionaryArray.from_arrays(array.indices, values)
    return array.view(_without_promise(array.type))


def _without_promise(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_promise(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_promise(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_without_promise(kind.value_type)))
    return BYTES.get(kind, kind)


def _records(batch: pa.RecordBatch) -> list[object]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [BROKEN]
    return [row for number in range(batch.num_rows) for row in _records(batch.slice(number, 1))]
