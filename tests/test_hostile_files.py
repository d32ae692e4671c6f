"""Hostile headers, commits, id orders, plans and overlays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdstore
from kdstore import layout
from kdstore.errors import HeaderError, KDStoreError
from kdstore.hashing import sha256_hex
from kdstore.layout import commit_path, is_partial, is_shard_path
from kdstore.readers.stats import store_stats
from kdstore.readers.verify import verify_store
from tests.golden.arrays import GOLDEN
from tests.hostile import (
    DEEP,
    SHARD_PATHS,
    copy_store,
    edit_header,
    edit_json,
    read_all,
    shard_file,
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return copy_store("pps-50257", tmp_path / "store")


JSON_FILES = ["kdstore.json", commit_path(0), "overlays/lse/overlay.json"]
JSON_FILES.append(f"overlays/second/{commit_path(1)}")
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "deep list": b"[" * DEEP,
    "deep object": b'{"a":' * DEEP,
    "deep and closed": b"[" * DEEP + b"]" * DEEP,
    "deep value": b'{"identity":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "depth that loads": b'{"identity":' + b'{"a":' * 900 + b"1" + b"}" * 901,
    "not utf-8": b'{"format_version": "\xff\xfe"}',
    "utf-16": '{"format_version": "1.0"}'.encode("utf-16"),
    "utf-8 with a mark": b"\xef\xbb\xbf{}",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "long number": b'{"unit": ' + b"9" * 100_000 + b"}",
    "zeros": b"\0" * 1000,
}


@pytest.mark.parametrize("path", JSON_FILES)
@pytest.mark.parametrize("name", TEXTS)
def test_json_that_is_none(store: Path, path: str, name: str) -> None:
    (store / path).write_bytes(TEXTS[name])
    with pytest.raises(HeaderError) as caught:
        kdstore.open(store)
    assert path in str(caught.value)


@pytest.mark.parametrize("path", JSON_FILES)
def test_json_of_any_size_is_not_read(store: Path, path: str) -> None:
    """A sparse file of a terabyte."""
    with (store / path).open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(HeaderError, match="too large"):
        kdstore.open(store)


@pytest.mark.parametrize("path", JSON_FILES)
def test_a_folder_where_json_should_be(store: Path, path: str) -> None:
    (store / path).unlink()
    (store / path).mkdir()
    if path.endswith("overlay.json"):
        assert "lse" not in kdstore.open(store).overlays.found
    else:
        with pytest.raises(KDStoreError):
            kdstore.open(store)


IDENTITY: list[tuple[str, Any]] = [
    ("vocab_size", 0),
    ("vocab_size", 1 << 25),
    ("vocab_size", True),
    ("vocab_size", 50_257.0),
    ("vocab_size", "50257"),
    ("seed", None),
    ("seed", "7"),
    ("seed", 7.5),
    ("seed", [7]),
    ("plan_digest", 7),
    ("id_order_digest", None),
    ("vocab_digest", []),
    ("signals", None),
    ("signals", {}),
    ("signals", {"main": None}),
    ("signals", {"main": []}),
]


@pytest.mark.parametrize(("name", "value"), IDENTITY)
def test_identities_that_are_none(store: Path, name: str, value: Any) -> None:
    edit_header(store, lambda content: content["identity"].update({name: value}))
    with pytest.raises(HeaderError, match=f"{name[:4]}"):
        kdstore.open(store)


SIGNALS: list[tuple[dict[str, Any], str]] = [
    ({"scalars": [7]}, "no names"),
    ({"scalars": [["entropy"]]}, "no names"),
    ({"scalars": [None]}, "no names"),
    ({"scalars": {"entropy": 1}}, "a list"),
    ({"scalars": ["entropy", "entropy"]}, "none twice"),
    ({"scalars": [f"s{i}" for i in range(5000)]}, "at most"),
    ({"codec": "holograms/1"}, "unknown codec"),
    ({"codec": 7}, "codec"),
    ({"codec": "scalars/1"}, "unknown codec"),
    ({"selection": 7}, "selection"),
    ({"selection": "pps"}, "usable 'tau'"),
    ({"selection": "pps:tau=nan"}, "usable 'tau'"),
    ({"selection": "pps:tau=inf"}, "usable 'tau'"),
    ({"selection": "pps:tau=1e-300"}, "usable 'tau'"),
    ({"selection": "pps:tau=-1"}, "usable 'tau'"),
    ({"selection": "pps:tau=" + "9" * 10_000}, "usable 'tau'"),
    ({"codec": "counts/1", "selection": "counts:n=1e300"}, "usable 'n'|cannot read"),
    ({"codec": "ranked/1"}, "cannot read row group"),
    ({"scalars": ["mood"]}, "signal/main/mood"),
]


@pytest.mark.parametrize(("change", "words"), SIGNALS)
def test_signals_that_cannot_be_read(store: Path, change: dict[str, Any], words: str) -> None:
    """The shards' footers name the header's digest, so what passes the header fails there."""
    edit_header(store, lambda content: content["identity"]["signals"]["main"].update(change))
    words = f"{words}|belongs to another store"
    with pytest.raises(KDStoreError, match=words):
        kdstore.open(store, overlays=())[0]


def test_numbers_that_canonical_json_does_not_have(store: Path) -> None:
    text = (store / "kdstore.json").read_text()
    for number in ("1e999", "-1e999", '"\\ud800"'):
        (store / "kdstore.json").write_text(text.replace('"seed": 7', f'"seed": 7, "x": {number}'))
        with pytest.raises(HeaderError, match="canonical JSON"):
            kdstore.open(store)


@pytest.mark.parametrize("units", [-1, True, 1.0, "2", None, 1 << 60, [2]])
def test_units_that_are_no_count(store: Path, units: Any) -> None:
    for path in ("kdstore.json", "overlays/lse/overlay.json"):
        before = (store / path).read_bytes()
        edit_json(store / path, lambda content: content["plan"].update(units=units))
        with pytest.raises(HeaderError, match=r"plan\.units"):
            kdstore.open(store)
        (store / path).write_bytes(before)


PATHS = ["../x", "/etc/passwd", "tokenizer/../../x", "a//b", "", ".", "a/.", "s3://bucket/x"]
PATHS += [
    "C:/x",
    "..\\x",
    "a\\..\\..\\x",
    "tokenizer/a\0b",
    "file:///etc/passwd",
    "a\nb",
    "tokenizer/",
]


@pytest.mark.parametrize("path", PATHS)
def test_files_that_leave_the_store(store: Path, path: str) -> None:
    edit_json(store / "kdstore.json", lambda content: content["files"].update({path: "0" * 64}))
    with pytest.raises(HeaderError, match="leaves the store"):
        kdstore.open(store)


@pytest.mark.parametrize("path", SHARD_PATHS)
def test_shards_that_leave_the_store(store: Path, path: str) -> None:
    assert not is_shard_path(path)
    edit_json(store / commit_path(0), lambda content: content["files"][0].update(path=path))
    with pytest.raises(HeaderError, match="no path of a shard"):
        kdstore.open(store)


def test_names_end_where_they_end() -> None:
    assert layout.unit_of_commit("000012.json") == 12
    assert layout.unit_of_commit("1234567.json") == 1_234_567
    for name in ("000012.json\n", "0000012.json", "\n000012.json", "00001\u0662.json", "12.json"):
        assert layout.unit_of_commit(name) is None
    assert layout.count_of_manifest("manifest-000012.parquet") == 12
    for name in (
        "manifest-000012.parquet\n",
        "manifest-0000012.parquet",
        "x/manifest-000012.parquet",
    ):
        assert layout.count_of_manifest(name) is None
    assert is_partial("commits/.000001.json.0123abcd.partial")
    assert not is_partial("commits/.000001.json.0123abcd.partial\n")


RECORDS: list[dict[str, Any]] = [
    {"bytes": -1},
    {"bytes": 1 << 60},
    {"bytes": True},
    {"bytes": "12"},
    {"rows": 1 << 40},
    {"rows": 10**400},
    {"rows": 1.5},
    {"tokens": None},
    {"footer_bytes": 1 << 30},
    {"xxh3_128": 7},
    {"footer_xxh3": None},
    {"path": 7},
    {"path": ["data/part-000000-00000000.parquet"]},
    {"role": ["main"]},
    {"role": "other"},
]


@pytest.mark.parametrize("record", RECORDS)
def test_records_that_are_none(store: Path, record: dict[str, Any]) -> None:
    edit_json(store / commit_path(0), lambda content: content["files"][0].update(record))
    with pytest.raises(HeaderError, match="damaged commit"):
        kdstore.open(store)


COMMITS: list[dict[str, Any]] = [
    {"unit": 1e999},
    {"unit": "0"},
    {"unit": 0.0},
    {"unit": None},
    {"files": None},
    {"files": [None]},
    {"files": {"main": 1}},
    {"files": []},
    {"config_digest": 7},
    {"statistics": []},
    {"statistics": {"entries": "many"}},
    {"statistics": {"entries": 1e999}},
    {"statistics": {"scalar_sums": [1]}},
    {"statistics": {"scalar_sums": {"entropy": "x"}}},
    {"provenance": 7},
    {"provenance": {"padding_mass": "x"}},
    {"unit": 1},
    {"unit": -1},
    {"unit": 1 << 70},
]


@pytest.mark.parametrize("change", COMMITS)
def test_commits_that_are_none(store: Path, change: dict[str, Any]) -> None:
    text = json.dumps({**json.loads((store / commit_path(0)).read_text()), **change})
    (store / commit_path(0)).write_text(text.replace("Infinity", "1e999"))
    with pytest.raises(HeaderError, match="commit"):
        kdstore.open(store)


@pytest.mark.parametrize("name", ["idorder.arrow", "plan.parquet", "tokenizer/table.arrow"])
def test_damaged_files_beside_the_header(store: Path, name: str) -> None:
    good = (store / name).read_bytes()
    random = np.random.default_rng(0)
    for _ in range(40):
        bad = bytearray(good)
        at, length = int(random.integers(len(good))), int(random.integers(1, 64))
        bad[at : at + length] = random.integers(0, 256, length, dtype=np.uint8).tobytes()
        (store / name).write_bytes(bad)
        if bytes(bad) != good:
            assert not verify_store(kdstore.open(store, overlays=())).ok


def with_order(store: Path, table: pa.Table) -> None:
    """Another id order, with the digests that it has."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (store / "idorder.arrow").write_bytes(sink.getvalue().to_pybytes())
    ids = table["id"].to_numpy()
    lists = table["successors"].combine_chunks()
    parts = (ids, np.diff(lists.offsets.to_numpy()), lists.flatten().to_numpy())
    digest = sha256_hex(b"".join(part.astype("<i4").tobytes() for part in parts))
    edit_header(store, lambda content: content["identity"].update(id_order_digest=digest))


def order_table(ids: list[int], successors: list[list[int]]) -> pa.Table:
    return pa.table(
        {"id": pa.array(ids, pa.int32()), "successors": pa.array(successors, pa.list_(pa.int32()))}
    )


ORDERS: list[tuple[list[int], list[list[int]], str]] = [
    (list(range(50)), [[50]] * 50, "outside the vocabulary"),
    (list(range(50)), [[-1]] * 50, "outside the vocabulary"),
    ([0] * 50, [[]] * 50, "no permutation"),
    (list(range(1, 51)), [[]] * 50, "no permutation"),
    (list(range(60)), [[]] * 60, "not of the store's vocabulary"),
    (list(range(40)), [[]] * 40, "not of the store's vocabulary"),
    ([], [], "not of the store's vocabulary|cannot read"),
]


@pytest.mark.parametrize(("ids", "successors", "words"), ORDERS)
def test_id_orders_that_are_none(
    tmp_path: Path, ids: list[int], successors: list[list[int]], words: str
) -> None:
    store = copy_store("topk-50", tmp_path / "store")
    with_order(store, order_table(ids, successors))
    with pytest.raises(HeaderError, match=words):
        kdstore.open(store)[0]


def test_offsets_of_an_id_order_that_leave_it(tmp_path: Path) -> None:
    """Arrow follows them without a look."""
    store = copy_store("topk-50", tmp_path / "store")
    good = np.arange(0, 102, 2, dtype="<i4")
    lists = pa.ListArray.from_arrays(pa.array(good), pa.array(np.zeros(100, np.int32)))
    table = pa.table({"id": pa.array(np.arange(50, dtype=np.int32)), "successors": lists})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    assert data.count(good.tobytes()) == 1
    bad = np.append(good[:-1], np.int32(2**31 - 1)).tobytes()
    (store / "idorder.arrow").write_bytes(data.replace(good.tobytes(), bad))
    with pytest.raises(HeaderError, match="cannot read the id order"):
        kdstore.open(store)[0]


def test_a_plan_with_one_id_twice(tmp_path: Path) -> None:
    from kdstore.writers.plan import Plan

    store = copy_store("topk-50", tmp_path / "store")
    table = pq.read_table(store / "plan.parquet")
    ids = table["sample_id"].to_pylist()
    table = table.set_column(2, table.field(2), pa.array([ids[1], *ids[1:]]))
    pq.write_table(table, store / "plan.parquet")
    digest = Plan(table).digest()
    edit_header(store, lambda content: content["identity"].update(plan_digest=digest))
    problems = "".join(verify_store(kdstore.open(store)).problems)
    assert "two samples have one id" in problems


def test_a_commit_of_a_unit_that_vanishes(store: Path) -> None:
    (store / commit_path(0)).rename(store / "commits" / "0000000.json")
    assert len(kdstore.open(store)) == 2
    (store / commit_path(0)).symlink_to(store / "nowhere")
    with pytest.raises(HeaderError, match="commit"):
        kdstore.open(store)


def test_statistics_of_any_kind_can_be_summed(store: Path) -> None:
    assert store_stats(kdstore.open(store))["num_samples"] == 8
    assert len(read_all(store)) == 16
    assert shard_file(store).parent == store / "data"
    assert (GOLDEN / "pps-50257" / "manifest-000002.parquet").exists()
