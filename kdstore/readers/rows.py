"""The rows of one row group, cell by cell, without copies of what a signal's planes hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from kdstore.codecs.rows import MAX_SPANS
from kdstore.parquet import NULLABLE


class RowGroup:
    """A row group's table; ``cells(i)`` are those of row i, by column."""

    def __init__(self, table: pa.Table) -> None:
        refuse_nulls(table)
        self._length = len(table)
        self._columns = {name: _column(name, table[name]) for name in table.column_names}

    def __len__(self) -> int:
        return self._length

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self._columns)

    def cells(self, index: int) -> dict[str, Any]:
        """All cells of a row; ValueError for a null that may not be one.

        Bytes are views of the table's memory, token ids int32 arrays.
        """
        return {name: cell(index) for name, cell in self._columns.items()}


def refuse_nulls(table: pa.Table) -> None:
    """ValueError if a column has a null that may have none."""
    for name in table.column_names:
        if table[name].null_count and name not in NULLABLE:
            raise ValueError(f"column {name!r} has {table[name].null_count} nulls")


def _column(name: str, column: pa.ChunkedArray) -> Callable[[int], Any]:
    """What gives the cell of a row."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of no rows
        array = pa.concat_arrays(array.chunks) if array.chunks else pa.array([], column.type)
    if pa.types.is_large_binary(array.type):
        return _bytes(array)
    if name == "input_ids":
        return _token_ids(array)
    if name == "spans":
        return lambda index: _spans(array[index])
    return lambda index: array[index].as_py()


def _bytes(array: pa.Array) -> Callable[[int], memoryview]:
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, "<i8")[array.offset : array.offset + len(array) + 1].tolist()
    view = memoryview(data if data is not None else b"").cast("B")  # Arrow's bytes are signed
    return lambda index: view[ends[index] : ends[index + 1]]


def _token_ids(array: pa.Array) -> Callable[[int], Any]:
    if array.values.null_count:
        raise ValueError("a token id is null")
    ids, ends = array.values.to_numpy(), array.offsets.to_numpy()
    return lambda index: ids[ends[index] : ends[index + 1]]


def _spans(scalar: pa.Scalar) -> Any:
    if len(scalar) > MAX_SPANS:
        raise ValueError(f"{len(scalar)} spans, at most {MAX_SPANS}")
    return scalar.as_py()
