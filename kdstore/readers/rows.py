"""The rows of one row group, cell by cell, without copies of what a signal's planes hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdstore.codecs.rows import MAX_SPANS
from kdstore.parquet import NULLABLE

Cells = dict[str, list[Any]]  # of some rows, by column
_Places = Sequence[int]


class RowGroup:
    """A row group's table; ``take(places)`` are the cells of some of its rows."""

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

    def take(self, places: Sequence[int]) -> Cells:
        """The cells of each column at some places; ValueError for what no sample has.

        Bytes are views of the table's memory, token ids int32 arrays.
        """
        return {name: cells(places) for name, cells in self._columns.items()}


def refuse_nulls(table: pa.Table) -> None:
    """ValueError if a column has a null that may have none."""
    for name in table.column_names:
        if table[name].null_count and name not in NULLABLE:
            raise ValueError(f"column {name!r} has {table[name].null_count} nulls")


def _column(name: str, column: pa.ChunkedArray) -> Callable[[_Places], list[Any]]:
    """What gives the cells of rows."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of no rows
        array = pa.concat_arrays(array.chunks) if array.chunks else pa.array([], column.type)
    if pa.types.is_large_binary(array.type):
        return _bytes(array)
    if name == "input_ids":
        return _token_ids(array)
    if name == "spans":
        return lambda places: _spans(array.take(pa.array(places, pa.int64())))
    return lambda places: array.take(pa.array(places, pa.int64())).to_pylist()


def _bytes(array: pa.Array) -> Callable[[_Places], list[memoryview]]:
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, "<i8")[array.offset : array.offset + len(array) + 1].tolist()
    view = memoryview(data if data is not None else b"").cast("B")  # Arrow's bytes are signed
    return lambda places: [view[ends[place] : ends[place + 1]] for place in places]


def _token_ids(array: pa.Array) -> Callable[[_Places], list[Any]]:
    if array.values.null_count:
        raise ValueError("a token id is null")
    ids, ends = array.values.to_numpy(), array.offsets.to_numpy().tolist()
    return lambda places: [ids[ends[place] : ends[place + 1]] for place in places]


def _spans(array: pa.Array) -> list[Any]:
    longest = pc.max(array.value_lengths()).as_py() or 0
    if longest > MAX_SPANS:
        raise ValueError(f"{longest} spans, at most {MAX_SPANS}")
    return array.to_pylist()  # type: ignore[no-any-return]
