"""The manifest: many commits in one Parquet table, so that opening a store reads one small file.

A manifest is nothing but commits, so anyone can rebuild it. Its flat columns repeat what the JSON
beside them says of each shard: they are read and checked at once, however many commits there are.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdstore.commit import MAX_OF_RECORD, Commit
from kdstore.errors import HeaderError
from kdstore.layout import SHARD_PATTERN
from kdstore.parquet import read_table

FLAT_COLUMNS = pa.schema(
    [
        ("unit", pa.int64()),
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
        ("scored", pa.int64()),
        ("xxh3_128", pa.string()),
        ("footer_bytes", pa.int64()),
        ("footer_xxh3", pa.string()),
        ("config_digest", pa.string()),
    ]
)
_JSON = pa.schema([("commit", pa.string())])
_SCHEMA = pa.unify_schemas([FLAT_COLUMNS, _JSON])
_READ_ERRORS = (pa.ArrowException, KeyError, OSError, ValueError, TypeError)
REBUILD = "remove the manifest: the commits hold the same, and the next dump writes it again"


class Manifest:
    """A manifest's bytes, None where a store has none; what is asked for is unpacked."""

    def __init__(self, data: bytes | None, *, where: str) -> None:
        self.data, self.where = data, where
        self._texts: pa.ChunkedArray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_texts": None}

    def columns(self) -> pa.Table:
        """The flat columns, each cell within its limits, units ascending; HeaderError if not."""
        table = self._read(FLAT_COLUMNS)
        try:
            _check_columns(table)
        except ValueError as error:
            raise self._damaged(error) from error
        return table.cast(FLAT_COLUMNS)

    def json(self, row: int) -> bytes:
        """The JSON of the commit in a row; the first that is asked for unpacks all."""
        if self._texts is None:
            self._texts = self._read(_JSON)["commit"]
        return bytes(self._texts[row].as_py().encode("utf-8"))

    def _read(self, schema: pa.Schema) -> pa.Table:
        if self.data is None:
            return schema.empty_table()
        try:
            return read_table(self.data, schema)
        except _READ_ERRORS as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> HeaderError:
        return HeaderError("cannot read the manifest", where=self.where, got=error, todo=REBUILD)


def manifest_bytes(commits: Sequence[Commit]) -> bytes:
    """A Parquet table of commits, in order of unit, each with its JSON beside the flat columns."""
    rows = [
        {**flat_row(commit), "commit": commit.to_bytes().decode("utf-8")}
        for commit in sorted(commits, key=lambda commit: commit.unit)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def flat_row(commit: Commit) -> dict[str, Any]:
    """A commit's cells in the flat columns."""
    return {
        "unit": commit.unit,
        **asdict(commit.shard),
        "config_digest": commit.config_digest,
    }


def numbers(table: pa.Table, name: str) -> NDArray[np.int64]:
    """int64 [rows]: a column of numbers."""
    return np.asarray(table[name].to_numpy(), dtype=np.int64)


def _check_columns(table: pa.Table) -> None:
    """ValueError unless the record of every row is one that a commit may have."""
    if (np.diff(numbers(table, "unit")) <= 0).any():
        raise ValueError("units that do not ascend")
    for name, most in MAX_OF_RECORD.items():
        values = numbers(table, name)
        outside = values[(values < 0) | (values > most)]
        if len(outside):
            raise ValueError(f"{name} is {outside[0]}, not 0 to {most}")
    paths = table["path"].cast(pa.string())
    fits = pc.match_substring_regex(paths, rf"\A{SHARD_PATTERN}\z")
    for path in paths.filter(pc.invert(fits)).slice(0, 1).to_pylist():
        raise ValueError(f"{path!r} is no path of a shard in the store")
