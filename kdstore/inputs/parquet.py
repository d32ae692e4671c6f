"""Parquet: rows streamed batch by batch, never a whole file in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdstore.errors import InputError
from kdstore.inputs.base import ROW_FIELDS, Row
from kdstore.inputs.files import FileSource, InputFile

_BATCH_ROWS = 256


class ParquetSource(FileSource):
    """Rows of one Parquet file or of a directory of them.

    Reads the columns that input rows may carry, or all where there is none of them, so that the
    error about the row can list what it found. Raises InputError for a damaged file.
    """

    kind = "parquet"

    def _rows_from(self, start: int) -> Iterator[Row]:
        skip = start
        for file in self.files:
            with _opened(file) as parquet:
                num_rows = parquet.metadata.num_rows
                if skip < num_rows:
                    yield from _file_rows(parquet, skip)
                skip = max(skip - num_rows, 0)

    def locate(self, row: int) -> str:
        """File and row within the file."""
        first = 0
        for file in self.files:
            with _opened(file) as parquet:
                num_rows = parquet.metadata.num_rows
            if row < first + num_rows:
                return f"{file.location}, row {row - first}"
            first += num_rows
        return super().locate(row)


@contextmanager
def _opened(file: InputFile) -> Iterator[Any]:
    with file.open() as stream:
        try:
            yield pq.ParquetFile(stream)
        except pa.ArrowException as error:
            raise InputError(
                "cannot read the Parquet file",
                where=file.location,
                expected="a whole Parquet file",
                got=f"{type(error).__name__}: {error}",
                todo="write the file again; a file cut short while copying looks like this",
            ) from error


def _file_rows(parquet: Any, skip: int) -> Iterator[Row]:
    """Rows from number ``skip`` of the file; row groups before it are not read."""
    groups: list[int] = []
    for group in range(parquet.num_row_groups):
        num_rows = parquet.metadata.row_group(group).num_rows
        if not groups and num_rows <= skip:
            skip -= num_rows
        else:
            groups.append(group)
    names = [name for name in parquet.schema_arrow.names if name in ROW_FIELDS]
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=groups, columns=names or None):
        if skip < batch.num_rows:
            yield from batch.slice(skip).to_pylist()
        skip = max(skip - batch.num_rows, 0)
