"""Reading an audited store: ``main`` without its audit, the audit with its own hash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdstore
from kdstore.codecs import IdOrder, codec_for
from kdstore.errors import CorruptShardError, HeaderError, UsageError
from kdstore.hashing import Purpose, RowKeys, json_digest
from kdstore.layout import signal_column
from kdstore.readers.verify import verify_store
from tests.hostile import commit_table
from tests.readers.test_store import shard_of

Dump = Callable[..., Path]
PLANES = codec_for("full", order=IdOrder.identity(2), scalars=()).planes
AUDIT_COLUMNS = [signal_column("audit", name) for name in ("runs", *PLANES, "row_hash")]


@pytest.fixture
def audited(dump: Dump) -> Path:
    return dump(audit_fraction=0.25)


def commit_again(store: Path, table: pa.Table) -> None:
    """Another content of unit 0's shard, committed as if it had been written so."""
    for manifest in store.glob("manifest-*"):
        manifest.unlink()
    commit_table(store, table)


def test_columns_of_the_audit_come_last_with_their_hash(audited: Path) -> None:
    names = pq.read_schema(shard_of(audited)).names
    assert names[-len(AUDIT_COLUMNS) - 1 :] == ["row_hash", *AUDIT_COLUMNS]
    assert names[:3] == ["sample_id", "num_tokens", "num_scored"]


def test_main_is_read_without_the_audit(audited: Path) -> None:
    store = kdstore.open(audited)
    columns = store.shard(0).row_group(0).columns
    assert columns[-1] == "row_hash"
    assert not [name for name in columns if "audit" in name]
    both = store.with_signal("audit").shard(0).row_group(0).columns
    assert both == [*columns, *AUDIT_COLUMNS]


def test_one_store_gives_another_of_its_signals(audited: Path) -> None:
    store = kdstore.open(audited)
    audit = store.with_signal("audit")
    assert store[3].num_scored > audit[3].num_scored > 0
    assert audit.with_signal("main")[3].runs == store[3].runs
    with pytest.raises(UsageError, match="'nothing'"):
        store.with_signal("nothing")


@pytest.mark.parametrize("column", AUDIT_COLUMNS)
def test_damage_to_the_audit_is_found(audited: Path, column: str) -> None:
    """By verify and by its reader; ``main`` is untouched by it."""
    shard = shard_of(audited)
    want = kdstore.open(audited)[0].signal
    chunks = pq.ParquetFile(shard).metadata.row_group(0)
    chunk = next(
        chunks.column(i)
        for i in range(chunks.num_columns)
        if chunks.column(i).path_in_schema == column
    )
    data = bytearray(shard.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    shard.write_bytes(data)
    report = verify_store(kdstore.open(audited))
    assert not report.ok
    assert any("row group 0" in problem for problem in report.problems)
    with pytest.raises(CorruptShardError, match="row group 0"):
        kdstore.open(audited, signal="audit")[0]
    np.testing.assert_array_equal(kdstore.open(audited)[0].signal.ids_N, want.ids_N)  # type: ignore[union-attr]


def test_audits_that_changed_places_are_found(audited: Path) -> None:
    """Whole cells under another sample's id: only the hash can tell."""
    table = pq.read_table(shard_of(audited))
    order = [1, 0, *range(2, len(table))]
    for name in AUDIT_COLUMNS:
        index = table.column_names.index(name)
        table = table.set_column(index, table.field(index), table.column(index).take(order))
    commit_again(audited, table)
    assert kdstore.open(audited)[0].sample_id == "row-0"
    for index in (0, 1):
        with pytest.raises(CorruptShardError, match="row hash differs"):
            kdstore.open(audited, signal="audit")[index]
    problems = "".join(verify_store(kdstore.open(audited)).problems)
    assert problems.count("row hash differs") == 2


def test_a_shard_that_lacks_its_audit_is_found(audited: Path) -> None:
    table = pq.read_table(shard_of(audited))
    commit_again(audited, table.drop_columns(["signal/audit/row_hash"]))
    assert kdstore.open(audited)[0].sample_id == "row-0"
    with pytest.raises(CorruptShardError, match="signal/audit/row_hash"):
        kdstore.open(audited, signal="audit")[0]


def test_damage_to_main_is_reported_once(audited: Path) -> None:
    table = pq.read_table(shard_of(audited))
    index = table.column_names.index("row_hash")
    hashes = pa.array([1, *table["row_hash"].to_pylist()[1:]], pa.uint64())
    commit_again(audited, table.set_column(index, table.field(index), hashes))
    problems = verify_store(kdstore.open(audited)).problems
    assert sum("row hash differs" in problem for problem in problems) == 1


def test_positions_that_the_seed_does_not_pick_are_found(
    dump: Dump, monkeypatch: pytest.MonkeyPatch
) -> None:
    uniform = RowKeys.uniform

    def other(self: RowKeys, purpose: Purpose, *, count: int = 1) -> np.ndarray:
        values = uniform(self, purpose, count=count)
        return 1 - values if purpose is Purpose.AUDIT else values

    with monkeypatch.context() as patched:
        patched.setattr(RowKeys, "uniform", other)
        store = dump(audit_fraction=0.25)
    problems = verify_store(kdstore.open(store)).problems
    assert len(problems) > 50
    assert "'row-0' is not audited where seed and fraction say" in problems[0]


def test_an_audited_store_verifies(audited: Path) -> None:
    assert verify_store(kdstore.open(audited)).problems == []


@pytest.mark.parametrize("fraction", [None, "half", []])
def test_a_header_with_no_fraction_is_refused(audited: Path, fraction: object) -> None:
    path = audited / "kdstore.json"
    header = json.loads(path.read_text())
    header["identity"]["signals"]["audit"]["fraction"] = fraction
    header["config_digest"] = json_digest(header["identity"])
    path.write_text(json.dumps(header))
    with pytest.raises(HeaderError, match=r"signals\.audit\.fraction"):
        kdstore.open(audited)
