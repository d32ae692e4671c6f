"""The frozen work plan: which source rows make which unit.

Planning reads and tokenises the whole source once, without the teacher. It finds every input error
before the first forward pass, cuts units by tokens at row boundaries, and counts the tokens that
the id order is made of.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdstore.codecs.counting import OrderBuilder
from kdstore.codecs.order import IdOrder
from kdstore.errors import HeaderError, InputError
from kdstore.hashing import canonical_json, sha256_hex
from kdstore.parquet import read_table
from kdstore.sample import Sample

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
        numbers = [self.table[n].to_numpy() for n in self.table.column_names if n != "sample_id"]
        ids = canonical_json(self.table["sample_id"].to_pylist())
        return sha256_hex(b"".join([*(n.astype("<i8").tobytes() for n in numbers), ids]))

    def unit(self, unit: int) -> PlannedUnit:
        """What one unit is made of."""
        units = self.table["unit"].to_numpy()
        low, high = np.searchsorted(units, [unit, unit + 1])
        return PlannedUnit(unit, self.table.slice(low, high - low))

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
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    order = OrderBuilder(vocab_size)
    seen: dict[str, int] = {}
    unit, tokens_in_unit = 0, 0
    for source_row, samples in rows:
        if tokens_in_unit >= unit_tokens and samples:
            unit, tokens_in_unit = unit + 1, 0
        for sample in samples:
            _check_new(sample, source_row, seen, where)
            _check_ids(sample, vocab_size, f"{where}, row {source_row}")
            order.add(sample.input_ids_T)
            values = (unit, source_row, sample.sample_id, sample.num_tokens, sample.num_scored)
            for name, value in zip(_SCHEMA.names, values, strict=True):
                columns[name].append(value)
            tokens_in_unit += sample.num_tokens
        on_row(1)
    if not seen:
        raise InputError("no samples to dump", where=where, expected="at least one row", got=0)
    return Plan(pa.table(columns, schema=_SCHEMA)), order.build()


def _check_new(sample: Sample, row: int, seen: dict[str, int], where: str) -> None:
    if sample.sample_id in seen:
        raise InputError(
            f"two samples have the id {sample.sample_id!r}",
            where=where,
            expected="unique ids",
            got=f"rows {seen[sample.sample_id]} and {row}",
            todo="make the field 'id' unique, or remove it to have rows numbered",
        )
    seen[sample.sample_id] = row


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
