"""Stores that someone made to do harm: every digest right, the content not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

import kdstore
from kdstore.codecs.rows import row_hashes
from kdstore.footer import read_footer
from kdstore.hashing import json_digest
from kdstore.layout import ROW_HASH, commit_path
from kdstore.pages import Chunk
from kdstore.readers.rows import RowGroup
from kdstore.readers.shard import _covered_columns
from kdstore.sample import Sample
from tests.golden.arrays import GOLDEN

Edit = Callable[[dict[str, Any]], object]


DEEP = 1_000_000  # levels of nested JSON
SHARD_PATHS = ["../data/part-000000-00000000.parquet", "/data/part-000000-00000000.parquet"]
SHARD_PATHS += ["data/../data/part-000000-00000000.parquet", "data/part-000000-00000000.parquet\n"]
SHARD_PATHS += ["s3://x/data/part-000000-00000000.parquet", "data//part-000000-00000000.parquet"]
SHARD_PATHS += ["data/part-000000-0000000G.parquet", "data/part-00000\u0660-00000000.parquet"]
SHARD_PATHS += ["\ndata/part-000000-00000000.parquet", "data/part-000000-00000000.parquet/x"]


def footer_of(data: bytes) -> bytes:
    """The footer of a Parquet file, its length and the magic."""
    return data[-8 - int.from_bytes(data[-8:-4], "little") :]


def chunks_of(data: bytes, group: int) -> list[Chunk]:
    """The column chunks of a row group of a Parquet file."""
    leaves = pq.ParquetFile(pa.BufferReader(data)).schema
    names = [leaves.column(index).path for index in range(len(leaves))]
    return read_footer(footer_of(data), names)[group].chunks


def copy_store(name: str, target: Path) -> Path:
    """A copy of a golden store that may be harmed; without manifests, so that commits count."""
    shutil.copytree(GOLDEN / name, target)
    for manifest in target.rglob("manifest-*"):
        manifest.unlink()
    return target


def shard_file(folder: Path, unit: int = 0) -> Path:
    """The committed shard of a unit of a store or overlay."""
    commit = json.loads((folder / commit_path(unit)).read_text())
    return folder / str(commit["files"][0]["path"])


def edit_json(path: Path, edit: Edit) -> None:
    """Change the object in a JSON file; the identity's digest is made anew where there is one."""
    content = json.loads(path.read_text())
    edit(content)
    if "identity" in content:
        content["config_digest"] = json_digest(content["identity"])
    path.write_text(json.dumps(content))


def edit_header(store: Path, edit: Edit) -> None:
    """Change the header, and every commit with it."""
    edit_json(store / "kdstore.json", edit)
    digest = json.loads((store / "kdstore.json").read_text())["config_digest"]
    for commit in (store / "commits").iterdir():
        edit_json(commit, lambda content: content.update(config_digest=digest))


def commit_bytes(folder: Path, data: bytes, unit: int = 0, **record: object) -> None:
    """These bytes as a unit's shard, committed with their sizes and hashes; others may be given."""
    shard_file(folder, unit).write_bytes(data)
    footer_bytes = min(len(data), 8 + int.from_bytes(data[-8:-4], "little"))
    found = {
        "bytes": len(data),
        "xxh3_128": xxhash.xxh3_128_hexdigest(data),
        "footer_bytes": footer_bytes,
        "footer_xxh3": xxhash.xxh3_64_hexdigest(data[len(data) - footer_bytes :]),
        **record,
    }
    edit_json(folder / commit_path(unit), lambda content: content["files"][0].update(found))


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """A table as a shard is written, but for some options."""
    sink = pa.BufferOutputStream()
    settings = {
        "compression": "zstd",
        "use_dictionary": False,
        "write_statistics": ["sample_id"],
        "write_page_index": True,
        "write_page_checksum": True,
        **options,
    }
    pq.write_table(table, sink, **settings)
    return bytes(sink.getvalue())


def commit_table(folder: Path, table: pa.Table, unit: int = 0, **options: Any) -> None:
    """A table as a unit's shard; ``options`` are Parquet's."""
    commit_bytes(folder, parquet_bytes(table, **options), unit, rows=len(table))


def with_cells(table: pa.Table, row: int, cells: dict[str, Any]) -> pa.Table:
    """The table with other cells in a row, and with hashes that hold for them."""
    for name, cell in cells.items():
        column = table[name].to_pylist()
        column[row] = cell
        table = _with_column(table, name, pa.array(column, table.schema.field(name).type))
    return rehashed(table)


def rehashed(table: pa.Table) -> pa.Table:
    """The table with row hashes that hold."""
    signals = {name.split("/")[1] for name in table.column_names if name.startswith("signal/")}
    for signal in sorted(signals, reverse=True):
        for hashes, covered in _covered_columns(table.column_names, signal).items():
            if hashes in table.column_names and (signal == "main" or hashes != ROW_HASH):
                rows = RowGroup(table.select(covered))
                values = row_hashes(covered, rows.take(range(len(table))))
                table = _with_column(table, hashes, pa.array(values, pa.uint64()))
    return table


def read_all(store: Path) -> list[Sample]:
    """Every sample of a store, of each signal and each draw, all overlays with it."""
    opened = kdstore.open(store)
    samples: list[Sample] = []
    for name in opened.header.identity["signals"]:
        one = opened.with_signal(name)
        for draw in range(one.num_draws):
            alone = [one[index, draw] for index in range(len(one))]
            together = one.__getitems__([(index, draw) for index in range(len(one))])
            for sample, other in zip(alone, together, strict=True):
                np.testing.assert_array_equal(sample.signal.ids_N, other.signal.ids_N)  # type: ignore[union-attr]
            samples += alone
    opened.token_table()
    return samples


def check_sane(samples: list[Sample], vocab_size: int) -> None:
    """What a reader may rely on, whatever the bytes: ids in range and in order, sums of one."""
    for sample in samples:
        signal = sample.signal
        assert signal is not None
        assert len(signal) == sample.num_scored
        ids = np.concatenate([signal.ids_N, sample.input_ids_T])
        assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < vocab_size)
        assert (np.diff(signal.rows_N * (1 << 32) + signal.ids_N) > 0).all()
        total = signal.kept_mass_S + np.exp(signal.rest_S.astype(np.float64))
        np.testing.assert_allclose(total, 1, atol=1e-5)
        assert not np.isnan(signal.logprobs_N).any()
        assert not any(np.isnan(values).any() for values in signal.scalars.values())


def _with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    index = table.column_names.index(name)
    return table.set_column(index, table.field(index), column)
