"""Files that declare more than they hold, or hold little that stands for much."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdstore
from kdstore import parquet
from kdstore.arrowfile import read_ipc
from kdstore.errors import CorruptShardError, HeaderError
from kdstore.pages import Chunk, _pages, check_pages
from kdstore.parquet import CheckedParquet, Memory
from kdstore.readers.verify import verify_store
from kdstore.thrift import read_struct
from tests.golden.arrays import GOLDEN
from tests.hostile import commit_bytes, copy_store, footer_of, parquet_bytes, shard_file, with_cells

LARGE = 1 << 27  # bytes of a cell of zeros: its size takes five bytes, as any up to 2 GiB does
READ = """
import resource, sys
import kdstore
from kdstore.errors import KDStoreError
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    kdstore.open(sys.argv[1])[0]
except KDStoreError as error:
    print(type(error).__name__, error)
"""


def zigzag(value: int) -> bytes:
    """A number as Thrift's compact protocol has it."""
    value, out = value << 1, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@pytest.fixture(scope="module")
def large_shard() -> bytes:
    """A shard of 20 kB with 128 MiB of zeros in it."""
    table = pq.read_table(shard_file(GOLDEN / "pps-50257"))
    table = with_cells(table, 0, {"signal/main/exact": bytes(LARGE)})
    return parquet_bytes(table)


def read_in_a_process(store: Path) -> str:
    """The error of a read with a gibibyte of addresses beyond those of the program."""
    pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    command = [sys.executable, "-c", READ, str(store)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_sizes(data: bytes, *, in_page: int, in_footer: int) -> bytes:
    """The large shard, whose large page declares other sizes."""
    metadata = pq.read_metadata(pa.BufferReader(data)).row_group(0)
    columns = (metadata.column(index) for index in range(metadata.num_columns))
    (column,) = (c for c in columns if c.path_in_schema == "signal/main/exact")
    start = column.data_page_offset
    pages = _pages(data[start : start + column.total_compressed_size])
    large = zigzag(max(page.uncompressed_bytes for page in pages))
    total = zigzag(column.total_uncompressed_size)
    assert data.count(large) >= 1
    assert data.count(total) >= 1
    return data.replace(large, zigzag(in_page)).replace(total, zigzag(in_footer))


def test_a_page_that_declares_two_gibibytes(tmp_path: Path, large_shard: bytes) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    honest = pq.read_metadata(pa.BufferReader(large_shard)).row_group(0)
    sizes = [honest.column(i).total_uncompressed_size for i in range(honest.num_columns)]
    commit_bytes(store, with_sizes(large_shard, in_page=2**31 - 1, in_footer=max(sizes)), rows=6)
    assert "bytes and 6 values, the footer" in read_in_a_process(store)


def test_a_footer_that_declares_two_gibibytes(tmp_path: Path, large_shard: bytes) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    bad = with_sizes(large_shard, in_page=2**31 - 1, in_footer=2**31 + 40)
    commit_bytes(store, bad, rows=6)
    assert "bytes before compression, 1073741824 at most" in read_in_a_process(store)


def test_a_bomb(tmp_path: Path, large_shard: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Honest about its size, which is more than is allowed."""
    assert len(large_shard) < 100_000
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", LARGE)
    store = copy_store("pps-50257", tmp_path / "store")
    commit_bytes(store, large_shard, rows=6)
    before = pa.total_allocated_bytes()
    with pytest.raises(CorruptShardError, match="bytes before compression"):
        kdstore.open(store)[0]
    assert pa.total_allocated_bytes() - before < 1 << 20


NOTHINGS: list[tuple[str, pa.Array]] = [
    ("row_hash", pa.nulls(10_000_000, pa.uint64())),
    ("signal/main/top", pa.nulls(10_000_000, pa.large_binary())),
    ("input_ids", pa.array([[None] * 5_000_000], pa.list_(pa.int32()))),
    ("spans", pa.array([[None] * 5_000_000], pa.list_(pa.struct([("supervised", pa.bool_())])))),
]


@pytest.mark.parametrize(("name", "array"), NOTHINGS)
def test_nothing_many_times(name: str, array: pa.Array) -> None:
    data = parquet_bytes(pa.table({name: array}), write_statistics=False)
    assert len(data) < 50_000
    file = CheckedParquet(Memory(data), footer_of(data), plain=True)
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match=r"values in \d+ bytes"):
        file.read_group(0, [name])
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_column_that_ends_outside_the_file() -> None:
    """Nothing is asked for before all that a row group declares lies in the file."""
    data = parquet_bytes(pq.read_table(shard_file(GOLDEN / "pps-50257")))

    class Short(Memory):
        def read_ranges(self, ranges: object) -> list[bytes]:
            raise AssertionError(ranges)

    file = CheckedParquet(Short(data[:200]), footer_of(data), plain=True)
    with pytest.raises(ValueError, match=r"ends at byte \d+ of 200"):
        file.read_group(0, file.schema.names)


def test_columns_at_each_others_place() -> None:
    """A chunk that lies where another does is looked at as what it is said to be."""
    table = pq.read_table(shard_file(GOLDEN / "pps-50257"))
    data = parquet_bytes(table)
    column = pq.read_metadata(pa.BufferReader(data)).row_group(0).column(0)
    sizes = (column.total_compressed_size, column.total_uncompressed_size, column.num_values)
    chunk: dict[str, Any] = dict(
        zip(("compressed_bytes", "uncompressed_bytes", "num_values"), sizes, strict=True)
    )
    start = column.data_page_offset
    page = data[start : start + column.total_compressed_size]
    check_pages(page, Chunk("x", start, **chunk, is_bool=False), plain=True)
    for name, change in (("num_values", 1), ("uncompressed_bytes", -1), ("compressed_bytes", -1)):
        other = {**chunk, name: chunk[name] + change}
        with pytest.raises(ValueError, match=r"pages of|no page header"):
            check_pages(page, Chunk("x", start, **other, is_bool=False), plain=True)


@pytest.mark.parametrize("declared", [1 << 31, 1 << 50, (1 << 63) - 1, -2])
def test_an_arrow_buffer_that_declares_more(tmp_path: Path, declared: int) -> None:
    store = copy_store("pps-50257", tmp_path / "store")
    data = (store / "idorder.arrow").read_bytes()
    honest = struct.pack("<q", 4 * 50_257)
    assert data.count(honest) == 1
    assert read_ipc(data).num_rows == 50_257
    (store / "idorder.arrow").write_bytes(data.replace(honest, struct.pack("<q", declared)))
    before = pa.total_allocated_bytes()
    with pytest.raises(HeaderError, match=r"batches of \d+ bytes|a buffer of -2"):
        kdstore.open(store)[0]
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_statistics_of_the_wrong_length_do_not_end_the_process(tmp_path: Path) -> None:
    """pyarrow's view of a column chunk calls std::terminate for them: it is not used."""
    store = copy_store("pps-50257", tmp_path / "store")
    data = shard_file(store).read_bytes()
    footer = footer_of(data)
    fields, _ = read_struct(footer[:-8])
    columns = (column[3] for group in fields[4] for column in group[1])
    histogram = next(c[16][2] for c in columns if len(c.get(16, {}).get(2, [])) == 2)
    good = b"".join([b"\x26", *(zigzag(value) for _, value in histogram)])
    assert good in footer
    bad = footer[:-8].replace(good, b"\x16" + zigzag(histogram[0][1]))
    tail = len(bad).to_bytes(4, "little") + b"PAR1"
    commit_bytes(store, data[: -len(footer)] + bad + tail, rows=6)
    assert read_in_a_process(store).startswith("CorruptShardError")
    kind = verify_store(kdstore.open(store)).problems
    assert "histogram size mismatch" in "".join(kind)
