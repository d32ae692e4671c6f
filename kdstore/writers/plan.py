"""The frozen work plan: which source rows make which unit.

Planning reads and tokenises the whole source once, without the teacher. It finds every input error
before the first forward pass, cuts units by tokens at row boundaries, and counts the tokens that
the id order is made of.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdstore.codecs.counting import OrderBuilder
from kdstore.codecs.order import IdOrder
from kdstore.errors import HeaderError, InputError
from kdstore.hashing import canonical_json, sample_hash
from kdstore.parquet import read_table
from kdstore.sample import Sample

CHUNK_SAMPLES = 1 << 17
_SCHEMA = pa.schema(
    [
        ("unit", pa.int32()),
        ("source_row", pa.int64()),
        ("sample_id", pa.string()),
        ("num_tokens", pa.int32()),
        ("num_scored", pa.int32()),
    ]
)


@dataclass(frozen=True, eq=False)
class PlannedUnit:
    """The samples of one unit: the rows of the plan that are its own, not copied."""

    unit: int
    rows: pa.Table

    @property
    def ids_and_lengths(self) -> list[tuple[str, int]]:
        """(sample id, tokens) of each sample, in order."""
        columns = (self.rows[name].to_pylist() for name in ("sample_id", "num_tokens"))
        return list(zip(*columns, strict=True))

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return int(pc.sum(self.rows["num_tokens"]).as_py())

    @cached_property
    def first_row(self) -> int:
        """The first source row."""
        return int(self.rows["source_row"][0].as_py())

    @cached_property
    def last_row(self) -> int:
        """The source row after the last one."""
        return int(self.rows["source_row"][-1].as_py()) + 1


@dataclass(frozen=True, eq=False)
class Plan:
    """One row per sample: unit, source_row, sample_id, num_tokens, num_scored."""

    table: pa.Table

    @property
    def num_units(self) -> int:
        """Units of work; units are numbered from 0."""
        return int(self.table["unit"][-1].as_py()) + 1 if len(self.table) else 0

    def total(self, column: str) -> int:
        """Sum of a count column."""
        return int(self.table[column].to_numpy().sum())

    def digest(self) -> str:
        """SHA-256 over the plan's content, whatever file it came in."""
        digest = hashlib.sha256()
        for name in self.table.column_names:
            if name != "sample_id":
                digest.update(self.table[name].to_numpy().astype("<i8").tobytes())
        for start in range(0, max(1, len(self.table)), CHUNK_SAMPLES):
            ids = self.table["sample_id"].slice(start, CHUNK_SAMPLES).to_pylist()
            digest.update((b"," if start else b"[") + canonical_json(ids)[1:-1])
        digest.update(b"]")
        return digest.hexdigest()

    def unit(self, unit: int) -> PlannedUnit:
        """What one unit is made of."""
        low, high = np.searchsorted(self._units, [unit, unit + 1])
        return PlannedUnit(unit, self.table.slice(low, high - low))

    @cached_property
    def _units(self) -> NDArray[np.int32]:
        return np.asarray(self.table["unit"].to_numpy())

    def to_bytes(self) -> bytes:
        """The plan as a Parquet file."""
        sink = io.BytesIO()
        pq.write_table(self.table, sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, *, expected_digest: str, where: str) -> Plan:
        """The plan in a file's bytes; HeaderError unless it is the one the header names."""
        try:
            plan = cls(read_table(data, _SCHEMA).cast(_SCHEMA).combine_chunks())
            _check_whole(plan)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise HeaderError("cannot read the plan", where=where, got=error) from error
        if plan.digest() != expected_digest:
            raise HeaderError(
                "the plan is not the one that the header names",
                where=where,
                expected=expected_digest,
                got=plan.digest(),
                todo="restore plan.parquet from a backup",
            )
        return plan


def _check_whole(plan: Plan) -> None:
    """ValueError for a null, for a sample id that comes twice, and for units out of order."""
    table = plan.table
    if any(column.null_count for column in table.columns):
        raise ValueError("a value is missing")
    units, ids = table["unit"].to_numpy(), table["sample_id"]
    if len(table) and not (units[0] == 0 and set(np.diff(units).tolist()) <= {0, 1}):
        raise ValueError("units have gaps, or do not ascend")
    if len(ids.unique()) != len(ids):
        raise ValueError("two samples have one id")


def make_plan(
    rows: Iterator[tuple[int, list[Sample]]],
    *,
    unit_tokens: int,
    vocab_size: int,
    where: str,
    on_row: Callable[[int], None] = lambda count: None,
) -> tuple[Plan, IdOrder]:
    """The plan and the id order of a source's samples, row by row.

    Raises InputError if there is no sample, if two samples share an id, or if a token id lies
    outside the teacher's logits.
    """
    planned = _Rows(where)
    order = OrderBuilder(vocab_size)
    unit, tokens_in_unit = 0, 0
    for source_row, samples in rows:
        if tokens_in_unit >= unit_tokens and samples:
            unit, tokens_in_unit = unit + 1, 0
        for sample in samples:
            _check_ids(sample, vocab_size, f"{where}, row {source_row}")
            order.add(sample.input_ids_T)
            planned.add((unit, source_row, sample.sample_id, sample.num_tokens, sample.num_scored))
            tokens_in_unit += sample.num_tokens
        on_row(1)
    table = planned.table()
    if not len(table):
        raise InputError("no samples to dump", where=where, expected="at least one row", got=0)
    return Plan(table), order.build()


class _Rows:
    """The rows of a plan, gathered in chunks: as Python objects they would take ten times as much.

    InputError, at the latest at the chunk's end, if two of them have one sample id.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._waiting: list[tuple[Any, ...]] = []
        self._chunks: list[pa.Table] = []
        self._hashes: NDArray[np.uint64] = np.zeros(0, np.uint64)

    def add(self, values: tuple[Any, ...]) -> None:
        """One more row: the values of all columns."""
        self._waiting.append(values)
        if len(self._waiting) == CHUNK_SAMPLES:
            self._flush()

    def table(self) -> pa.Table:
        """All rows."""
        self._flush()
        return pa.concat_tables(self._chunks).combine_chunks()

    def _flush(self) -> None:
        columns = list(zip(*self._waiting, strict=True)) or [() for _ in _SCHEMA]
        self._chunks.append(pa.table(dict(zip(_SCHEMA.names, columns, strict=True)), _SCHEMA))
        self._waiting = []
        ids = columns[_SCHEMA.get_field_index("sample_id")]
        hashes = np.concatenate([self._hashes, np.array(list(map(sample_hash, ids)), np.uint64)])
        hashes.sort(kind="stable")
        twice = hashes[1:][hashes[1:] == hashes[:-1]]
        if len(twice):
            self._check_new(set(twice.tolist()))
        self._hashes = hashes

    def _check_new(self, twice: set[int]) -> None:
        """InputError unless samples of these hashes have different ids after all."""
        seen: dict[str, int] = {}
        for chunk in self._chunks:
            columns = (chunk[name].to_pylist() for name in ("sample_id", "source_row"))
            for sample_id, row in zip(*columns, strict=True):
                if sample_hash(sample_id) in twice:
                    if sample_id in seen:
                        raise InputError(
                            f"two samples have the id {sample_id!r}",
                            where=self._where,
                            expected="unique ids",
                            got=f"rows {seen[sample_id]} and {row}",
                            todo="make the field 'id' unique, or remove it to have rows numbered",
                        )
                    seen[sample_id] = row


def _check_ids(sample: Sample, vocab_size: int, where: str) -> None:
    ids = sample.input_ids_T
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        raise InputError(
            "a token id lies outside the teacher's logits",
            where=f"{where}, sample {sample.sample_id!r}",
            expected=f"0 to {vocab_size - 1}",
            got=f"{int(ids.min())} to {int(ids.max())}",
            todo="use the teacher's own tokenizer",
        )
