"""The shard reader: rows of one committed file, checked on the way.

The file's size and its footer are checked when it is opened, page checksums and the row hash when a
row is read, so a plain read gives exactly what was written or raises CorruptShardError.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import xxhash

from kdstore.codecs.base import SignalCodec
from kdstore.codecs.planes import Plane
from kdstore.codecs.rows import (
    MAX_JSON_CHARS,
    MAX_SPANS,
    PLAIN_COLUMNS,
    RUNS,
    decode_runs,
    encode_runs,
    row_hash,
)
from kdstore.commit import ShardRecord
from kdstore.errors import CorruptShardError, KDStoreError, StorageError
from kdstore.filesystem import Folder
from kdstore.header import Header, parse_json_object
from kdstore.layout import MAIN_SIGNAL, ROW_HASH, hash_column, signal_column
from kdstore.parquet import CheckedParquet
from kdstore.sample import Sample, Span
from kdstore.signal import SparseSignal

RESTORE = (
    "restore the shard from a copy; or, where its data/ lies, remove its unit's file in commits/ "
    "and every manifest-*.parquet, then run the same dump again: it makes the unit anew"
)
T = TypeVar("T")
_NULLABLE = ("text", "messages", "metadata")
_JSON_TYPES = {"messages": list, "metadata": dict}
_READ_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError)


@dataclass(frozen=True)
class RowDecoder:
    """Turns stored rows into samples: the codec of a signal, and the header it came from."""

    header: Header
    codec: SignalCodec
    signal: str

    def sample(self, cells: Mapping[str, Any]) -> Sample:
        """The sample of one row's cells; CorruptShardError unless all of it fits together."""
        ids = np.array(cells["input_ids"], dtype=np.int32)  # a copy: torch refuses Arrow's buffer
        num_tokens = int(cells["num_tokens"])
        num_scored = int(cells["num_scored"]) if self.signal == MAIN_SIGNAL else None
        _expect("num_tokens", num_tokens, len(ids))
        _check_ids(ids, self.codec.order.vocab_size)
        planes = {name: _plane(cells, self.signal, name) for name in (RUNS, *self.codec.planes)}
        runs = decode_runs(
            planes[RUNS].data.tobytes(), num_tokens=num_tokens, num_scored=num_scored
        )
        sample = Sample(
            sample_id=cells["sample_id"],
            input_ids_T=ids,
            spans=tuple(map(_span, cells["spans"])),
            runs=runs,
            text=cells.get("text"),
            messages=_json(cells, "messages"),
            metadata=_json(cells, "metadata"),
        )
        return replace(sample, signal=self.codec.decode(planes, sample.previous_S))

    def addition(self, cells: Mapping[str, Any], sample: Sample) -> SparseSignal:
        """What an overlay's row adds to a sample; CorruptShardError if it is another's row."""
        _expect("sample_id", cells["sample_id"], sample.sample_id)
        _expect("num_scored", int(cells["num_scored"]), sample.num_scored)
        _expect(RUNS, cells[signal_column(self.signal, RUNS)], encode_runs([sample]).cell(0))
        planes = {name: _plane(cells, self.signal, name) for name in self.codec.planes}
        return self.codec.decode(planes, sample.previous_S)


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

    def row_group(self, group: int) -> pa.Table:
        """One row group without the columns of other signals.

        Raises CorruptShardError if a page does not match its checksum.
        """
        columns = dict.fromkeys(
            name for column, covered in self._hashes.items() for name in (*covered, column)
        )
        try:
            return self._file.read_group(group, list(columns))
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

    def group_of_row(self, row: int) -> tuple[int, int]:
        """The row group that holds a row, and its place there; CorruptShardError if none does."""
        if row >= self.record.rows:
            raise self._corrupt("no such row", row=row, got=f"{self.record.rows} rows")
        group = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return group, row - int(self.first_rows[group])

    def sample(self, table: pa.Table, group: int, index: int) -> Sample:
        """The sample at a place of a row group's table, its hash checked and its signal decoded."""
        return self._decoded(table, group, index, self.decoder.sample)

    def addition(self, table: pa.Table, group: int, index: int, sample: Sample) -> SparseSignal:
        """What the row at that place, of an overlay's shard, adds to a sample; checked alike."""
        return self._decoded(
            table, group, index, lambda cells: self.decoder.addition(cells, sample)
        )

    def _decoded(
        self, table: pa.Table, group: int, index: int, decode: Callable[[dict[str, Any]], T]
    ) -> T:
        row = int(self.first_rows[group]) + index
        try:
            cells = {name: _cell(table, name, index) for name in table.column_names}
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
        try:
            return decode(cells)
        except (KDStoreError, *_READ_ERRORS) as error:
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


def _cell(table: pa.Table, name: str, index: int) -> Any:
    scalar = table.column(name)[index]
    if not scalar.is_valid:
        if name not in _NULLABLE:
            raise ValueError(f"column {name!r} is null")
        return None
    if name == "input_ids":
        if scalar.values.null_count:
            raise ValueError("a token id is null")
        return scalar.values.to_numpy()
    if pa.types.is_large_binary(scalar.type):
        return scalar.as_buffer().to_pybytes()
    if name == "spans" and len(scalar) > MAX_SPANS:
        raise ValueError(f"{len(scalar)} spans, at most {MAX_SPANS}")
    return scalar.as_py()


def _span(cell: dict[str, Any] | None) -> Span:
    if cell is None or None in cell.values():
        raise ValueError(f"a span has a null: {cell}")
    return Span(**cell)


def _plane(cells: Mapping[str, Any], signal: str, name: str) -> Plane:
    data = np.frombuffer(cells[signal_column(signal, name)], dtype=np.uint8)
    return Plane(data, np.array([0, len(data)]))


def _json(cells: Mapping[str, Any], name: str) -> Any:
    text = cells.get(name)
    if text is None:
        return None
    if len(text) > MAX_JSON_CHARS:
        raise ValueError(f"{name} of {len(text)} characters, at most {MAX_JSON_CHARS}")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, _JSON_TYPES[name]):
        raise ValueError(f"{name} is a {type(value).__name__}")
    return value


def _expect(name: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise CorruptShardError(
            f"{name} differs from the row's content", expected=expected, got=got
        )


def _check_ids(ids: np.ndarray[Any, np.dtype[np.int32]], vocab_size: int) -> None:
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        raise CorruptShardError(
            "a token id lies outside the vocabulary",
            expected=f"0 to {vocab_size - 1}",
            got=f"{int(ids.min())} to {int(ids.max())}",
        )
