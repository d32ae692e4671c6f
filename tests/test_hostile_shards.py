"""Shards whose digests are right and whose content is not: every one is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdstore
from kdstore.codecs.rows import MAX_SPANS, PLAIN_COLUMNS
from kdstore.errors import CorruptShardError
from kdstore.readers.verify import verify_store
from tests.hostile import (
    commit_bytes,
    commit_table,
    copy_store,
    parquet_bytes,
    read_all,
    rehashed,
    shard_file,
    with_cells,
)

EDGES = 1  # row of the second unit that has the golden store's edge positions


def plane(name: str) -> str:
    return f"signal/main/{name}"


def refused(store: Path, words: str) -> None:
    """By a read, which says what is wrong, and by verify."""
    with pytest.raises(CorruptShardError, match=words) as caught:
        read_all(store)
    assert "part-" in str(caught.value)
    assert not verify_store(kdstore.open(store)).ok


def first_row(store: Path, column: str) -> tuple[pa.Table, int, bytes]:
    """The first shard's table, and the first row where a column has bytes."""
    table = pq.read_table(shard_file(store))
    cells = table[column].to_pylist()
    row = next(row for row, cell in enumerate(cells) if cell)
    return table, row, cells[row]


def test_the_helper_alone_does_no_harm(tmp_path: Path) -> None:
    store = copy_store("pps-audit-300", tmp_path / "store")
    want = [sample.signal.logprobs_N for sample in read_all(store)]  # type: ignore[union-attr]
    table = pq.read_table(shard_file(store))
    commit_table(store, with_cells(table, 0, {"metadata": table["metadata"][0].as_py()}))
    for sample, logprobs in zip(read_all(store), want, strict=True):
        np.testing.assert_array_equal(sample.signal.logprobs_N, logprobs)  # type: ignore[union-attr]


CELLS: list[tuple[str, str, Any, str]] = [
    ("pps-50257", "counts", lambda cell: cell[:-1], "'counts' has the wrong length"),
    ("pps-50257", "counts", lambda cell: cell + b"\x11", "'counts' has the wrong length"),
    ("pps-50257", "counts", lambda cell: b"\xff" * len(cell), "'more' disagree"),
    ("pps-50257", "counts", lambda cell: b"\x00" * len(cell), "'more' disagree"),
    ("pps-50257", "more", lambda cell: cell + b"\xff\xff", "'more' disagree"),
    ("pps-50257", "top", lambda cell: b"\xff" * len(cell), "extra bytes"),
    ("pps-50257", "top/extra", lambda cell: cell[:-1], "extra bytes"),
    ("pps-50257", "tail", lambda cell: cell[:-1], "'tail' has the wrong length"),
    ("pps-50257", "weight", lambda cell: b"\x04" * len(cell), "outside its grid"),
    ("pps-50257", "weight", lambda cell: b"", "'weight' has the wrong length"),
    ("pps-500000", "value", lambda cell: b"\xbf" * len(cell), "grid|more than one"),
    ("pps-500000", "value", lambda cell: b"\x00" * len(cell), "outside its grid"),
    ("counts-131072", "count", lambda cell: b"\x00" * len(cell), "do not sum to n"),
    ("counts-131072", "repeats", lambda cell: b"\xbf" * len(cell), "wrong length"),
    ("counts-50", "single", lambda cell: b"\xbf" * len(cell), "outside the vocabulary"),
    ("topk-50", "id", lambda cell: b"\x31" * len(cell), "outside the vocabulary"),
    ("topk-50", "value/0", lambda cell: b"\xc5" * len(cell), "unknown value code"),
    ("topp-5000", "entries", lambda cell: b"\xff" * len(cell), "extra bytes"),
    ("full-50", "half/1", lambda cell: b"\x7e" * len(cell), "no log-probability"),
    ("full-50", "half/1", lambda cell: b"\x3c" * len(cell), "no log-probability"),
    ("full-50", "half/0", lambda cell: cell[:-1], "'half/0' has the wrong length"),
    ("topk-131072", "lse/3", lambda cell: b"\x7f" * len(cell), "not a number|NaN"),
    ("topk-131072", "label_rank", lambda cell: b"\xf7" * len(cell), "unknown code|extra bytes"),
    ("pps-50257", "runs", lambda cell: cell[:-4], "no pairs"),
    ("pps-50257", "runs", lambda cell: cell[4:] + cell[:4], "runs do not fit"),
    ("pps-50257", "runs", lambda cell: b"\0" * 4 + cell[4:], "runs do not fit"),
    ("pps-50257", "runs", lambda cell: cell[:-4] + b"\xff\xff\xff\x7f", "runs do not fit"),
    ("pps-50257", "runs", lambda cell: b"\0\0\0\x80" + cell[4:], "runs do not fit"),
]


@pytest.mark.parametrize(("name", "column", "change", "words"), CELLS)
def test_planes_that_contradict_each_other(
    tmp_path: Path, name: str, column: str, change: Any, words: str
) -> None:
    store = copy_store(name, tmp_path / "store")
    table, row, cell = first_row(store, plane(column))
    commit_table(store, with_cells(table, row, {plane(column): change(cell)}))
    refused(store, words)


def test_rows_that_make_up_for_each_other(tmp_path: Path) -> None:
    """Together their planes add up; alone, as verify reads them, neither does."""
    store = copy_store("pps-50257", tmp_path / "store")
    table = pq.read_table(shard_file(store))
    cells = table[plane("tail")].to_pylist()
    first = next(row for row in range(len(cells) - 1) if cells[row] and cells[row + 1])
    table = with_cells(table, first, {plane("tail"): cells[first][:-1]})
    moved = cells[first][-1:] + cells[first + 1]
    commit_table(store, with_cells(table, first + 1, {plane("tail"): moved}))
    refused(store, "'tail' has the wrong length")
    problems = verify_store(kdstore.open(store)).problems
    assert sum("'tail' has the wrong length" in problem for problem in problems) == 2


def test_gaps_that_would_overflow(tmp_path: Path) -> None:
    """Fifty of the largest gaps: 1.2e9, and each beyond the vocabulary alone."""
    store = copy_store("counts-131072", tmp_path / "store")
    table, row, _ = first_row(store, plane("single"))
    codes = table[plane("single")][row].as_py()
    cells = {plane("single"): b"\xfe" * len(codes), plane("single/extra"): b"\xff" * 3 * len(codes)}
    commit_table(store, with_cells(table, row, cells))
    refused(store, "outside the vocabulary")


PLAIN: list[tuple[dict[str, Any], str]] = [
    ({"num_tokens": -1}, "num_tokens"),
    ({"num_tokens": 2**31 - 1}, "num_tokens"),
    ({"num_scored": 2**31 - 1}, "runs do not fit"),
    ({"input_ids": [50_257]}, "num_tokens"),
    ({"input_ids": [50_257], "num_tokens": 1}, "outside the vocabulary"),
    ({"input_ids": [-1], "num_tokens": 1}, "outside the vocabulary"),
    ({"spans": [{"start": 0, "end": 999, "kind": "text", "supervised": True}]}, "span outside"),
    ({"spans": [{"start": -1, "end": 2, "kind": "text", "supervised": True}]}, "span outside"),
    ({"spans": [{"start": 2, "end": 1, "kind": "text", "supervised": True}]}, "span outside"),
    ({"spans": [{"start": 0, "end": 1, "kind": None, "supervised": True}]}, "span has a null"),
    ({"spans": [{"start": None, "end": 1, "kind": "", "supervised": True}]}, "span has a null"),
    ({"spans": [{"start": 0, "end": 1, "kind": "", "supervised": None}]}, "span has a null"),
    ({"spans": [None]}, "span has a null"),
    ({"metadata": "[" * 1_000_000}, "nested too deeply"),
    ({"metadata": '{"a":' * 1_000_000}, "nested too deeply"),
    ({"metadata": "{"}, "does not decode"),
    ({"metadata": "7"}, "metadata is a int"),
    ({"messages": "{}"}, "messages is a dict"),
    ({"metadata": '{"a": ' + "9" * 10_000 + "}"}, "does not decode"),
]


@pytest.mark.parametrize(("cells", "words"), PLAIN)
def test_plain_columns_that_make_no_sample(
    tmp_path: Path, cells: dict[str, Any], words: str
) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    table = pq.read_table(shard_file(store))
    commit_table(store, with_cells(table, 0, cells))
    refused(store, words)


def test_more_spans_than_memory_should_be_given_for(tmp_path: Path) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    table = pq.read_table(shard_file(store))
    spans = [[{"start": 0, "end": 0, "kind": "", "supervised": True}]] * len(table)
    spans[2] = spans[2] * (MAX_SPANS + 1)
    index = table.column_names.index("spans")
    array = pa.array(spans, table.field(index).type)
    commit_table(store, table.set_column(index, table.field(index), array))
    with pytest.raises(CorruptShardError, match=f"{MAX_SPANS + 1} spans"):
        kdstore.open(store)[2]


def test_an_id_that_is_null(tmp_path: Path) -> None:
    """Its hash cannot hold: the hash has no bytes for it."""
    store = copy_store("pps-50257", tmp_path / "store")
    table = pq.read_table(shard_file(store))
    ids = [[None, *row[1:]] for row in table["input_ids"].to_pylist()]
    index = table.column_names.index("input_ids")
    array = pa.array(ids, table.field(index).type)
    commit_table(store, table.set_column(index, table.field(index), array))
    refused(store, "token id is null")


TYPES: list[tuple[str, pa.DataType]] = [
    ("sample_id", pa.large_string()),
    ("sample_id", pa.binary()),
    ("num_tokens", pa.int64()),
    ("num_scored", pa.float64()),
    ("input_ids", pa.list_(pa.int64())),
    ("input_ids", pa.large_list(pa.int32())),
    ("input_ids", pa.list_(pa.list_(pa.int32()))),
    ("spans", pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))),
    ("signal/main/counts", pa.binary()),
    ("signal/main/counts", pa.string()),
    ("signal/main/counts", pa.list_(pa.uint8())),
    ("signal/main/counts", pa.dictionary(pa.int32(), pa.large_binary())),
    ("row_hash", pa.int64()),
    ("row_hash", pa.string()),
    ("text", pa.list_(pa.string())),
]


@pytest.mark.parametrize(("column", "kind"), TYPES)
def test_columns_of_another_type(tmp_path: Path, column: str, kind: pa.DataType) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    table = pq.read_table(shard_file(store))
    index = table.column_names.index(column)
    array = pa.nulls(len(table), kind)
    table = table.set_column(index, pa.field(column, kind), array)
    commit_table(store, table)
    refused(store, f"column '{column}' has type")


@pytest.mark.parametrize("column", ["sample_id", "input_ids", "row_hash", "signal/main/top"])
def test_columns_that_are_missing_or_null(tmp_path: Path, column: str) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    table = pq.read_table(shard_file(store))
    commit_table(store, table.drop_columns([column]))
    with pytest.raises(CorruptShardError):
        read_all(store)
    index = table.column_names.index(column)
    nulls = pa.nulls(len(table), table.field(index).type)
    commit_table(store, table.set_column(index, table.field(index), nulls))
    with pytest.raises(CorruptShardError, match=r"null|cannot read"):
        read_all(store)


def test_a_column_that_comes_twice(tmp_path: Path) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    table = pq.read_table(shard_file(store))
    commit_table(store, table.append_column(table.field("sample_id"), table["sample_id"]))
    refused(store, "two columns have one name")


OPTIONS: list[dict[str, Any]] = [
    {"use_dictionary": True},
    {"write_page_checksum": False},
    {"data_page_version": "2.0"},
    {"column_encoding": {"sample_id": "DELTA_BYTE_ARRAY"}},
    {"column_encoding": {"num_tokens": "DELTA_BINARY_PACKED"}},
    {"column_encoding": {"num_tokens": "BYTE_STREAM_SPLIT"}},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_pages_that_can_stand_for_more_than_they_are(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    commit_table(store, pq.read_table(shard_file(store)), **options)
    refused(store, r"no page of plain values with a checksum|no page header|values in \d+ bytes")


@pytest.mark.parametrize("compression", ["none", "snappy", "lz4", "gzip"])
def test_another_compression_is_read(tmp_path: Path, compression: str) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    want = [sample.sample_id for sample in read_all(store)]
    commit_table(store, pq.read_table(shard_file(store)), compression=compression)
    assert [sample.sample_id for sample in read_all(store)] == want


def test_a_file_without_a_row(tmp_path: Path) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    table = pq.read_table(shard_file(store))
    commit_bytes(store, parquet_bytes(table[:0]))
    refused(store, "row count")
    commit_table(store, table[:0])
    assert len(kdstore.open(store, overlays=())) == 2
    assert not verify_store(kdstore.open(store)).ok


@pytest.mark.parametrize("rows", [0, 1, 5, 7, 2**31 - 1])
def test_a_commit_that_lies_about_its_rows(tmp_path: Path, rows: int) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    commit_bytes(store, shard_file(store).read_bytes(), rows=rows)
    if rows:
        refused(store, "row count")
    assert not verify_store(kdstore.open(store)).ok


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1PAR1", b"PAR1\0\0\0\0PAR1", b"\xff" * 4000])
def test_files_that_are_no_parquet(tmp_path: Path, data: bytes) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    commit_bytes(store, data)
    refused(store, "cannot open the shard")


@pytest.mark.parametrize("footer_bytes", [0, 8, 12, 1 << 24])
def test_a_footer_that_is_hashed_in_part(tmp_path: Path, footer_bytes: int) -> None:
    import xxhash

    store = copy_store("pps-50257", tmp_path / "store")
    data = shard_file(store).read_bytes()
    tail = data[max(0, len(data) - footer_bytes) :] if footer_bytes else b""
    digest = xxhash.xxh3_64_hexdigest(tail)
    commit_bytes(store, data, footer_bytes=footer_bytes, footer_xxh3=digest)
    refused(store, "cannot open the shard")


def test_two_samples_with_one_id(tmp_path: Path) -> None:
    """No read of one sample can tell; verify does."""
    store = copy_store("pps-50257", tmp_path / "store")
    table = pq.read_table(shard_file(store))
    ids = table["sample_id"].to_pylist()
    commit_table(store, with_cells(table, 1, {"sample_id": ids[0]}))
    problems = "".join(verify_store(kdstore.open(store, overlays=())).problems)
    assert "the samples are not those that unit 0 plans" in problems


def test_an_audit_that_is_damaged_leaves_main_alone(tmp_path: Path) -> None:
    store = copy_store("pps-audit-300", tmp_path / "store")
    table = pq.read_table(shard_file(store))
    row = next(r for r, cell in enumerate(table["signal/audit/half/1"].to_pylist()) if cell)
    cell = table["signal/audit/half/1"][row].as_py()
    commit_table(store, with_cells(table, row, {"signal/audit/half/1": b"\x7e" * len(cell)}))
    assert len([sample.signal for sample in kdstore.open(store)]) == 8
    with pytest.raises(CorruptShardError, match="no log-probability"):
        kdstore.open(store, signal="audit")[row]
    runs = table["signal/audit/runs"][row].as_py()
    shifted = np.frombuffer(runs, "<i4") + 1
    commit_table(store, with_cells(table, row, {"signal/audit/runs": shifted.tobytes()}))
    assert "not audited where" in "".join(verify_store(kdstore.open(store)).problems)


@pytest.mark.parametrize(
    ("name", "cells", "words"),
    [
        ("second", {"num_scored": 1}, "num_scored"),
        ("second", {"sample_id": "another"}, "sample_id"),
        ("second", {"signal/main/runs": b""}, "runs"),
        ("second", {"signal/main/counts": b""}, "wrong length"),
        ("lse", {"signal/main/lse/0": b"\0"}, "wrong length"),
        ("reward", {"signal/main/reward/3": b"\x7f" * 20}, "wrong length|not a number"),
    ],
)
def test_overlays_with_right_hashes(
    tmp_path: Path, name: str, cells: dict[str, Any], words: str
) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    overlay = store / "overlays" / name
    table = pq.read_table(shard_file(overlay))
    commit_table(overlay, with_cells(table, 0, cells))
    refused(store, words)


def test_rows_of_an_overlay_in_another_order(tmp_path: Path) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    overlay = store / "overlays" / "second"
    table = pq.read_table(shard_file(overlay))
    commit_table(overlay, table.take([1, 0, *range(2, len(table))]))
    refused(store, "differs from the row's content")


def test_cells_are_hashed_before_they_are_decoded(tmp_path: Path) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    table = pq.read_table(shard_file(store))
    index = table.column_names.index("metadata")
    changed = table.set_column(index, table.field(index), [["[" * 1000] * len(table)])
    commit_table(store, changed)
    refused(store, "row hash differs")
    assert set(rehashed(table).column_names) >= set(PLAIN_COLUMNS)
