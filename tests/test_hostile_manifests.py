"""Hostile manifests: flat columns, the JSON beside them, texts that repeat."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdstore
from kdstore.errors import HeaderError
from kdstore.layout import commit_path
from kdstore.manifest import Manifest, manifest_bytes
from kdstore.readers.verify import verify_store
from tests.hostile import DEEP, SHARD_PATHS, copy_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return copy_store("pps-50257", tmp_path / "store")


def manifest_of(store: Path) -> pa.Table:
    """The table of a manifest that gathers a store's commits."""
    return pq.read_table(io.BytesIO(manifest_bytes(list(kdstore.open(store).commits))))


def with_column(table: pa.Table, name: str, column: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(column))


def write_manifest(store: Path, table: pa.Table, **options: Any) -> Path:
    path = store / "manifest-000002.parquet"
    pq.write_table(table, path, **options)
    return path


FLAT: list[tuple[str, list[Any]]] = [
    ("unit", [0, 0]),
    ("unit", [1, 0]),
    ("unit", [-1, 0]),
    ("unit", [0, 2]),
    ("unit", [0, None]),
    ("unit", [0.0, 1.0]),
    ("unit", ["0", "1"]),
    ("bytes", [1, -1]),
    ("bytes", [1, (1 << 48) + 1]),
    ("rows", [1, 1 << 31]),
    ("rows", [-(1 << 63), 1]),
    ("tokens", [None, 1]),
    ("scored", [1, 1 << 62]),
    ("footer_bytes", [1, 1 << 25]),
    ("path", [1, 2]),
    ("path", [b"data/part-000000-00000000.parquet"] * 2),
    ("path", ["data/part-000000-00000000.parquet", None]),
    *(("path", ["data/part-000000-00000000.parquet", path]) for path in SHARD_PATHS),
    ("xxh3_128", [7, 8]),
    ("xxh3_128", [None, None]),
    ("footer_xxh3", ["", None]),
    ("config_digest", ["", ""]),
    ("config_digest", [None, ""]),
]


@pytest.mark.parametrize(("name", "column"), FLAT)
def test_columns_of_a_manifest_that_are_none(store: Path, name: str, column: list[Any]) -> None:
    table = manifest_of(store)
    write_manifest(store, table)
    assert len(kdstore.open(store)) == 8
    write_manifest(store, with_column(table, name, column))
    with pytest.raises(HeaderError, match=r"manifest|names a unit|another store"):
        kdstore.open(store)


def test_a_manifest_that_lacks_a_column(store: Path) -> None:
    table = manifest_of(store)
    for name in table.column_names[:-1]:
        write_manifest(store, table.drop_columns(name))
        with pytest.raises(HeaderError, match="cannot read the manifest"):
            kdstore.open(store)
    write_manifest(store, table.drop_columns("commit"))
    with pytest.raises(HeaderError, match="cannot read the manifest"):
        kdstore.open(store).commits[0]


def test_json_of_a_manifest_that_its_columns_do_not_say(store: Path) -> None:
    """Opening does not look at it; whoever asks for the commit is told, and so is verify."""
    one, two = [(store / commit_path(unit)).read_text() for unit in (0, 1)]
    table = manifest_of(store)
    bad: list[list[Any]] = [[one, one], [two, one], [one, None], [one, ""], [one, "["], [1, 2]]
    bad += [[one, two.replace("data/part", "../part")], [one, "[" * DEEP], [None, None]]
    bad += [[one, two.replace('"rows": ', '"rows": 1')], [one, two.replace("digest", "d")]]
    bad += [[one, two.replace('"config_digest": "', '"config_digest": "0')]]
    for texts in bad:
        write_manifest(store, with_column(table, "commit", texts))
        opened = kdstore.open(store)
        assert (len(opened), opened[7].num_tokens > 0) == (8, True)
        with pytest.raises(HeaderError, match="manifest-000002"):
            opened.commits[-1]
        assert "manifest-000002" in "".join(verify_store(opened).problems)


@pytest.mark.parametrize("name", ["path", "xxh3_128", "footer_xxh3", "config_digest", "commit"])
def test_texts_of_a_manifest_that_are_not_utf_8(store: Path, name: str) -> None:
    table = manifest_of(store)
    texts = [b"\xb6" + text.encode() for text in table[name].to_pylist()]
    path = write_manifest(store, with_column(table, name, pa.array(texts).view(pa.string())))
    manifest = Manifest(path.read_bytes(), where="here")
    with pytest.raises(HeaderError, match="UTF8"):
        manifest.json(0) if name == "commit" else manifest.columns()


@pytest.mark.parametrize("as_dictionary", [False, True])
@pytest.mark.parametrize("name", ["commit", "xxh3_128"])
def test_a_manifest_of_repeated_rows_is_not_unpacked(
    store: Path, name: str, *, as_dictionary: bool
) -> None:
    """A few kilobytes that would be three gigabytes of text."""
    rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3000, np.int32)), ["x" * 1_000_000])
    table = manifest_of(store).take([0] * 3000)
    table = with_column(table, name, rows)
    path = write_manifest(store, table, compression="zstd", store_schema=as_dictionary)
    assert path.stat().st_size < 20_000
    manifest = Manifest(path.read_bytes(), where="here")
    with pytest.raises(HeaderError, match="texts of more than"):
        manifest.json(0) if name == "commit" else manifest.columns()
