"""The shard reader: rows of one committed file, checked on the way.

The file's size and its footer are checked when it is opened, page checksums and the row hash when a
row is read, so a plain read gives exactly what was written or raises CorruptShardError. Where a
local copy is damaged it is fetched again first, once.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from kdstore.codecs.rows import PLAIN_COLUMNS, row_hashes
from kdstore.commit import ShardRecord
from kdstore.errors import CorruptShardError, KDStoreError, StorageError
from kdstore.filesystem import Folder
from kdstore.header import parse_json_object
from kdstore.layout import MAIN_SIGNAL, ROW_HASH, hash_column, signal_column
from kdstore.parquet import CheckedParquet, Source
from kdstore.readers.decoder import RowDecoder
from kdstore.readers.download import LocalCopy, ShardFiles
from kdstore.readers.rows import Cells, RowGroup, refuse_nulls
from kdstore.sample import Sample
from kdstore.signal import SparseSignal

RESTORE = (
    "restore the shard from a copy; or, where its data/ lies, remove its unit's file in commits/ "
    "and every manifest-*.parquet, then run the same dump again: it makes the unit anew"
)
_REMOTE_GAP_BYTES, _LOCAL_GAP_BYTES = 1 << 20, 1 << 16  # read rather than asked around
A = TypeVar("A")
B = TypeVar("B")
_READ_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError)
DECODE_ERRORS = (KDStoreError, *_READ_ERRORS)


class ShardReader:
    """One shard, opened and checked: row groups on demand, samples by row.

    With ``files`` row groups are read from a local copy, which is fetched when the first of them is
    asked for; footer and columns of a shard that is not there are read by ranges. Threads may read
    row groups and columns at once.
    """

    def __init__(
        self,
        folder: Folder,
        record: ShardRecord,
        decoder: RowDecoder,
        *,
        files: ShardFiles | None = None,
    ) -> None:
        self.record, self.decoder = record, decoder
        self.where = folder.location(record.path)
        self._folder = folder
        self._files = files if files is not None and files.takes(folder, record) else None
        self._renewed, self._fetching = False, threading.Lock()
        self._file = self._open()
        columns = _covered_columns(self._file.schema.names, decoder.signal)
        self._hashes = columns if decoder.columns is None else {}
        self._read_columns = decoder.columns_of(columns)
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

    @property
    def is_copy(self) -> bool:
        """Whether a local copy is read, which can be fetched again."""
        return isinstance(self._file.source, LocalCopy)

    def renew(self) -> None:
        """Fetch the local copy again; the second time nothing happens."""
        with self._fetching:
            source = self._file.source
            if self._files is not None and isinstance(source, LocalCopy) and not self._renewed:
                source.discard()
                self._file, self._renewed = self._fetched(self._files), True

    def row_group(self, group: int) -> RowGroup:
        """The rows of one row group, without the columns of other signals.

        Raises CorruptShardError if a page does not match its checksum.
        """
        with self._fetching:
            if self._files is not None and not self.is_copy:
                self._file = self._fetched(self._files)
        return self._read(
            f"cannot read row group {group}",
            lambda file: RowGroup(file.read_group(group, self._read_columns)),
        )

    def column(self, name: str) -> list[Any]:
        """All values of one plain column, without the signals."""
        return [value for chunk in self._column(name).chunks for value in chunk.to_pylist()]

    def lengths(self) -> NDArray[np.int32]:
        """int32, of each sample: tokens, read without anything else of the shard.

        Raises CorruptShardError if they are not as many as were committed.
        """
        tokens = self._column("num_tokens").cast(pa.int32()).fill_null(-1).to_numpy()
        total = int(tokens.sum(dtype=np.int64))
        if (tokens < 0).any() or total != self.record.tokens:
            raise self._corrupt("number of tokens", expected=self.record.tokens, got=total)
        return tokens  # type: ignore[no-any-return]

    def _column(self, name: str) -> pa.ChunkedArray:
        groups = range(self.num_row_groups)

        def read(file: CheckedParquet) -> pa.ChunkedArray:
            tables = file.read_groups(groups, [name])
            chunks = [chunk for table in tables for chunk in table[name].chunks]
            return pa.chunked_array(chunks, file.schema.field(name).type)

        return self._read(f"cannot read column {name!r}", read)

    def _read(self, failure: str, read: Callable[[CheckedParquet], A]) -> A:
        """What ``read`` gives; of a damaged local copy, what it gives once that is renewed."""
        file = self._file
        try:
            return self._checked(failure, lambda: read(file))
        except CorruptShardError:
            if not self.is_copy:
                raise
        self.renew()
        return self._checked(failure, lambda: read(self._file))

    def _checked(self, failure: str, read: Callable[[], A]) -> A:
        try:
            return read()
        except StorageError:
            raise
        except _READ_ERRORS as error:
            raise self._corrupt(failure, got=error) from error

    def plain(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Some plain columns of one row group, and nothing else of it; row hashes are not checked.

        Raises CorruptShardError if a page does not match its checksum.
        """

        def read(file: CheckedParquet) -> pa.Table:
            table = file.read_group(group, list(columns)).select(columns)
            table.validate(full=True)  # Arrow reads any bytes as text; polars takes it for UTF-8
            refuse_nulls(table)
            return table

        return self._read(f"cannot read {list(columns)} of group {group}", read)

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

    def groups_of_rows(self, rows: Sequence[int]) -> list[int]:
        """The row group that holds each row; CorruptShardError if none does."""
        if max(rows, default=0) >= self.record.rows:
            raise self._corrupt("no such row", row=max(rows), got=f"{self.record.rows} rows")
        groups: list[int] = (np.searchsorted(self.first_rows, rows, side="right") - 1).tolist()
        return groups

    def samples(self, rows: RowGroup, group: int, places: Sequence[int]) -> list[Sample]:
        """The samples at places of a row group, their hashes checked, their signals decoded."""
        return self._decoded(rows, group, places, lambda cells, _: self.decoder.samples(cells))

    def additions(
        self, rows: RowGroup, group: int, places: Sequence[int], samples: Sequence[Sample]
    ) -> list[SparseSignal]:
        """What the rows at these places, of an overlay's shard, add to samples; checked alike."""
        sample_at = dict(zip(places, samples, strict=True))
        return self._decoded(
            rows,
            group,
            places,
            lambda cells, some: self.decoder.additions(cells, [sample_at[place] for place in some]),
        )

    def _decoded(
        self,
        rows: RowGroup,
        group: int,
        places: Sequence[int],
        decode: Callable[[Cells, Sequence[int]], list[B]],
    ) -> list[B]:
        """Rows decoded together, or one by one if that fails, so that the error names its row."""
        cells = self.cells(rows, group, places)
        try:
            return decode(cells, places)
        except DECODE_ERRORS as error:
            if len(places) > 1:
                return [self._decoded(rows, group, [place], decode)[0] for place in places]
            row = int(self.first_rows[group]) + places[0]
            raise self._corrupt("the row does not decode", row=row, got=error) from error

    def cells(self, rows: RowGroup, group: int, places: Sequence[int]) -> Cells:
        """The cells at places of a row group, their hashes checked."""
        try:
            cells = rows.take(places)
            hashes = {name: row_hashes(covered, cells) for name, covered in self._hashes.items()}
        except _READ_ERRORS as error:
            for place in places if len(places) > 1 else []:
                self.cells(rows, group, [place])
            row = int(self.first_rows[group]) + places[0]
            raise self._corrupt("cannot read the row", row=row, got=error) from error
        for column, found in hashes.items():
            for place, stored, actual in zip(places, cells[column], found, strict=True):
                if stored != actual:
                    row = int(self.first_rows[group]) + place
                    raise self._corrupt("row hash differs", row=row, expected=stored, got=actual)
        return cells

    def _open(self) -> CheckedParquet:
        copy = self._files.find(self.record) if self._files is not None else None
        if copy is not None:
            try:
                return self._parquet(copy)
            except CorruptShardError:
                copy.discard()
        try:
            size = self._folder.size(self.record.path)
        except FileNotFoundError as error:
            raise self._missing() from error
        if size != self.record.bytes:
            raise self._corrupt("the shard's size differs", expected=self.record.bytes, got=size)
        return self._parquet(_StoredFile(self._folder, self.record))

    def _fetched(self, files: ShardFiles) -> CheckedParquet:
        try:
            copy = files.fetch(self._folder, self.record)
            try:
                return self._parquet(copy)
            except CorruptShardError:  # one that another process fetched, long ago
                copy.discard()
            return self._parquet(files.fetch(self._folder, self.record))
        except FileNotFoundError as error:
            raise self._missing() from error
        except KDStoreError:
            raise
        except ValueError as error:
            raise self._corrupt("the shard's bytes differ", got=error) from error

    def _missing(self) -> CorruptShardError:
        return self._corrupt("the shard is missing", expected="the committed file")

    def _parquet(self, source: Source) -> CheckedParquet:
        size = self.record.bytes
        start = size - min(self.record.footer_bytes, size)
        footer = self._checked(
            "cannot read the footer", lambda: source.read_ranges([(start, size)])[0]
        )
        digest = xxhash.xxh3_64_hexdigest(footer)
        if digest != self.record.footer_xxh3:
            raise self._corrupt(
                "the shard's footer differs", expected=self.record.footer_xxh3, got=digest
            )

        def opened() -> CheckedParquet:
            file = CheckedParquet(source, footer, plain=True)
            _check_schema(file.schema, self.decoder.signal)
            self._check_identity(file.schema)
            return file

        return self._checked("cannot open the shard", opened)

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


class _StoredFile:
    """A shard where the store lies, read by ranges."""

    def __init__(self, folder: Folder, record: ShardRecord) -> None:
        self._folder, self._path, self.size = folder, record.path, record.bytes
        self.max_gap_bytes = _REMOTE_GAP_BYTES if folder.local_root is None else _LOCAL_GAP_BYTES

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each range."""
        return self._folder.read_ranges(self._path, ranges)


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
