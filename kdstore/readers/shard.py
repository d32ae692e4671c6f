"""The shard reader: rows of one committed file, checked on the way.

The file's size and its footer are checked when it is opened, page checksums and the row hash when a
row is read, so a plain read gives exactly what was written or raises CorruptShardError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import xxhash

from kdstore.codecs.rows import PLAIN_COLUMNS, row_hash
from kdstore.commit import ShardRecord
from kdstore.errors import CorruptShardError, KDStoreError, StorageError
from kdstore.filesystem import Folder
from kdstore.header import parse_json_object
from kdstore.layout import MAIN_SIGNAL, ROW_HASH, hash_column, signal_column
from kdstore.parquet import CheckedParquet
from kdstore.readers.decoder import RowDecoder
from kdstore.readers.rows import RowGroup, refuse_nulls
from kdstore.sample import Sample
from kdstore.signal import SparseSignal

RESTORE = (
    "restore the shard from a copy; or, where its data/ lies, remove its unit's file in commits/ "
    "and every manifest-*.parquet, then run the same dump again: it makes the unit anew"
)
A = TypeVar("A")
B = TypeVar("B")
_READ_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError)


class ShardReader:
    """One shard, opened and checked: row groups on demand, samples by row."""

    def __init__(self, folder: Folder, record: ShardRecord, decoder: RowDecoder) -> None:
        self.record, self.decoder = record, decoder
        self.where = folder.location(record.path)
        self._file = self._open(folder)
        self._hashes = _covered_columns(self._file.schema.names, decoder.signal)
        self.first_rows = np.cumsum([0, *(group.num_rows for group in self._file.groups)])
        if int(self.first_rows[-1]) != record.rows:
            raise self._corrupt("row count", expected=record.rows, got=int(self.first_rows[-1]))

    @property
    def num_row_groups(self) -> int:
        """Row groups in the file."""
        return len(self._file.groups)

    def column_bytes(self) -> Counter[str]:
        """Compressed bytes of each column."""
        sizes: Counter[str] = Counter()
        for group in self._file.groups:
            for chunk in group.chunks:
                sizes[chunk.column] += chunk.compressed_bytes
        return sizes

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def row_group(self, group: int) -> RowGroup:
        """The rows of one row group, without the columns of other signals.

        Raises CorruptShardError if a page does not match its checksum.
        """
        columns = dict.fromkeys(
            name for column, covered in self._hashes.items() for name in (*covered, column)
        )
        try:
            return RowGroup(self._file.read_group(group, list(columns)))
        except StorageError:
            raise
        except _READ_ERRORS as error:
            raise self._corrupt(f"cannot read row group {group}", got=error) from error

    def column(self, name: str) -> list[Any]:
        """All values of one plain column, without the signals."""
        try:
            groups = [self._file.read_group(g, [name]) for g in range(self.num_row_groups)]
            values = [value for group in groups for value in group[name].to_pylist()]
        except StorageError:
            raise
        except _READ_ERRORS as error:
            raise self._corrupt(f"cannot read column {name!r}", got=error) from error
        return values

    def plain(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Some plain columns of one row group, and nothing else of it; row hashes are not checked.

        Raises CorruptShardError if a page does not match its checksum.
        """
        try:
            table = self._file.read_group(group, list(columns)).select(columns)
            table.validate(full=True)  # Arrow reads any bytes as text; polars takes it for UTF-8
            refuse_nulls(table)
        except StorageError:
            raise
        except _READ_ERRORS as error:
            raise self._corrupt(
                f"cannot read {list(columns)} of group {group}", got=error
            ) from error
        return table

    def bounds(self, group: int) -> dict[str, tuple[Any, Any]]:
        """Least and greatest value of the plain columns of a row group that have statistics."""
        chunks = [chunk for chunk in self._file.groups[group].chunks if chunk.name in PLAIN_COLUMNS]
        try:
            return {
                chunk.name: (
                    _bound(chunk.name, chunk.bounds[0]),
                    _bound(chunk.name, chunk.bounds[1]),
                )
                for chunk in chunks
                if chunk.bounds is not None
            }
        except UnicodeDecodeError as error:
            raise self._corrupt(f"cannot read statistics of group {group}", got=error) from error

    def group_of_row(self, row: int) -> tuple[int, int]:
        """The row group that holds a row, and its place there; CorruptShardError if none does."""
        if row >= self.record.rows:
            raise self._corrupt("no such row", row=row, got=f"{self.record.rows} rows")
        group = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return group, row - int(self.first_rows[group])

    def samples(self, rows: RowGroup, group: int, places: Sequence[int]) -> list[Sample]:
        """The samples at places of a row group, their hashes checked, their signals decoded."""
        cells = [self._cells(rows, group, place) for place in places]
        return self._decoded(cells, group, places, self.decoder.samples)

    def additions(
        self, rows: RowGroup, group: int, places: Sequence[int], samples: Sequence[Sample]
    ) -> list[SparseSignal]:
        """What the rows at these places, of an overlay's shard, add to samples; checked alike."""
        cells = [
            (self._cells(rows, group, place), sample)
            for place, sample in zip(places, samples, strict=True)
        ]
        return self._decoded(
            cells, group, places, lambda some: self.decoder.additions(*zip(*some, strict=True))
        )

    def _cells(self, rows: RowGroup, group: int, place: int) -> dict[str, Any]:
        """The cells of a row, its hashes checked."""
        row = int(self.first_rows[group]) + place
        try:
            cells = rows.cells(place)
            hashes = [
                (cells[column], row_hash(covered, cells))
                for column, covered in self._hashes.items()
            ]
        except StorageError:
            raise
        except _READ_ERRORS as error:
            raise self._corrupt("cannot read the row", row=row, got=error) from error
        for stored, actual in hashes:
            if stored != actual:
                raise self._corrupt("row hash differs", row=row, expected=stored, got=actual)
        return cells

    def _decoded(
        self,
        rows: Sequence[A],
        group: int,
        places: Sequence[int],
        decode: Callable[[Sequence[A]], list[B]],
    ) -> list[B]:
        """Rows decoded together, or one by one if that fails, so that the error names its row."""
        try:
            return decode(rows)
        except (KDStoreError, *_READ_ERRORS) as error:
            if len(rows) > 1:
                pairs = zip(rows, places, strict=True)
                return [self._decoded([r], group, [p], decode)[0] for r, p in pairs]
            row = int(self.first_rows[group]) + places[0]
            raise self._corrupt("the row does not decode", row=row, got=error) from error

    def _open(self, folder: Folder) -> CheckedParquet:
        try:
            size = folder.size(self.record.path)
        except FileNotFoundError as error:
            raise self._corrupt("the shard is missing", expected="the committed file") from error
        if size != self.record.bytes:
            raise self._corrupt("the shard's size differs", expected=self.record.bytes, got=size)
        footer_bytes = min(self.record.footer_bytes, size)
        footer = folder.read_range(self.record.path, size - footer_bytes, size)
        digest = xxhash.xxh3_64_hexdigest(footer)
        if digest != self.record.footer_xxh3:
            raise self._corrupt(
                "the shard's footer differs", expected=self.record.footer_xxh3, got=digest
            )
        try:
            file = CheckedParquet(folder.open_file(self.record.path), footer, plain=True)
            _check_schema(file.schema, self.decoder.signal)
            self._check_identity(file.schema)
        except StorageError:
            raise
        except _READ_ERRORS as error:
            raise self._corrupt("cannot open the shard", got=error) from error
        return file

    def _check_identity(self, schema: pa.Schema) -> None:
        content = parse_json_object(schema.metadata[b"kdstore"], where=self.where)
        digest = self.decoder.header.config_digest
        if content.get("config_digest") != digest:
            raise self._corrupt(
                "the shard belongs to another store",
                expected=digest,
                got=content.get("config_digest"),
            )

    def _corrupt(
        self, what: str, *, row: int | None = None, expected: Any = None, got: Any = None
    ) -> CorruptShardError:
        where = self.where if row is None else f"{self.where}, row {row}"
        return CorruptShardError(
            f"corrupt shard: {what}", where=where, expected=expected, got=got, todo=RESTORE
        )


def _bound(name: str, value: bytes) -> Any:
    is_text = PLAIN_COLUMNS[name] == pa.string()
    return value.decode() if is_text else int.from_bytes(value, "little", signed=True)


def _covered_columns(columns: list[str], signal: str) -> dict[str, list[str]]:
    """The hashes that a signal's reader checks, and the columns that each covers.

    ``row_hash`` covers all columns before it; those of other signals than ``main`` come after it.
    """
    before = list(takewhile(lambda name: name != ROW_HASH, columns))
    hashes = {ROW_HASH: before}
    if signal != MAIN_SIGNAL:
        own = [name for name in columns if name.startswith(signal_column(signal, ""))]
        own = [name for name in own if name != hash_column(signal)]
        hashes[hash_column(signal)] = ["sample_id", *own]
    return hashes


def _check_schema(schema: pa.Schema, signal: str) -> None:
    """ValueError unless columns that are read have the type of their name, and none comes twice."""
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("two columns have one name")
    for column, covered in _covered_columns(schema.names, signal).items():
        expected = {name: PLAIN_COLUMNS.get(name, pa.large_binary()) for name in covered}
        for name, kind in {**expected, column: pa.uint64()}.items():
            if schema.field(name).type != kind:
                found = schema.field(name).type
                raise ValueError(f"column {name!r} has type {found}, not {kind}")
