"""One bit of a shard: verify finds any, and a plain read any that it touches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import kdstore
from kdstore.errors import CorruptShardError
from kdstore.pages import check_pages
from kdstore.readers.store import Store
from kdstore.readers.verify import verify_store
from tests.fuzzing import digest
from tests.hostile import chunks_of, copy_store, shard_file

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
SHARDS = [("full-50", "", 200), ("pps-audit-300", "", 200), ("pps-50257", "", 40)]
SHARDS += [("pps-50257", "second", 30), ("pps-50257", "lse", 30)]


class Places:
    """What lies where in a shard: row groups of signals, and the footer."""

    def __init__(self, shard: Path) -> None:
        metadata = pq.read_metadata(shard)
        self.footer = shard.stat().st_size - metadata.serialized_size - 8
        self.rows: list[range] = []
        self.chunks: list[tuple[range, int, str]] = []
        for group in range(metadata.num_row_groups):
            one = metadata.row_group(group)
            first = self.rows[-1].stop if self.rows else 0
            self.rows.append(range(first, first + one.num_rows))
            for column in map(one.column, range(one.num_columns)):
                start = column.data_page_offset
                signal = "audit" if column.path_in_schema.startswith("signal/audit/") else "main"
                self.chunks.append(
                    (range(start, start + column.total_compressed_size), group, signal)
                )

    def touched(self, byte: int) -> tuple[range, str]:
        """The rows whose reading meets a byte, and the signal that is read."""
        for places, group, signal in self.chunks:
            if byte in places:
                return self.rows[group], signal
        return range(self.rows[-1].stop if byte >= self.footer else 0), "main"


def read_rows(path: Path, rows: range, signal: str, draw: int) -> list[str]:
    """A digest of each row's sample, or the word corrupt."""
    store = kdstore.open(path, signal=signal)
    return [read_row(store, row, draw if signal == "main" else 0) for row in rows]


def read_row(store: Store, row: int, draw: int) -> str:
    try:
        return digest([store[row, draw]])
    except CorruptShardError:
        return "corrupt"


@pytest.mark.parametrize(("name", "overlay", "flips"), SHARDS)
def test_any_flipped_bit_is_found(tmp_path: Path, name: str, overlay: str, flips: int) -> None:
    path = copy_store(name, tmp_path / "store")
    draw = 1 if overlay == "second" else 0
    shard = shard_file(path / "overlays" / overlay if overlay else path)
    places, good = Places(shard), shard.read_bytes()
    whole = range(places.rows[-1].stop)
    want = {
        signal: read_rows(path, whole, signal, draw)
        for signal in kdstore.open(path).header.identity["signals"]
    }
    assert all("corrupt" not in digests for digests in want.values())
    untouched = 0
    for bit in np.random.default_rng(1).integers(0, 8 * len(good), flips).tolist():
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        shard.write_bytes(bad)
        assert not verify_store(kdstore.open(path)).ok, bit
        rows, signal = places.touched(bit // 8)
        assert read_rows(path, rows, signal, draw) == ["corrupt"] * len(rows), bit
        if not rows:
            untouched += 1
            assert read_rows(path, whole, "main", draw) == want["main"], bit
        shard.write_bytes(good)
    assert untouched < flips // 4  # the first magic, and the page index, which no reader uses


def test_every_bit_of_a_page_header_is_found(tmp_path: Path) -> None:
    """No checksum covers them. What looks right is a checksum, and then Arrow finds it."""
    path = copy_store("pps-audit-300", tmp_path / "store")
    shard = shard_file(path)
    places, good = Places(shard), shard.read_bytes()
    row = places.rows[1].start
    chunks = chunks_of(good, 1)
    passed = 0
    for chunk in chunks:
        page = good[chunk.start : chunk.start + chunk.compressed_bytes]
        check_pages(page, chunk, plain=True)
        for bit in range(8 * page.index(ZSTD_MAGIC)):
            bad = bytearray(page)
            bad[bit // 8] ^= 1 << (bit % 8)
            try:
                check_pages(bytes(bad), chunk, plain=True)
            except ValueError:
                continue
            passed += 1
            if passed % 5 == 0:
                shard.write_bytes(good[: chunk.start] + bad + good[chunk.start + len(bad) :])
                _, signal = places.touched(chunk.start)
                with pytest.raises(CorruptShardError):
                    kdstore.open(path, signal=signal)[row]
    assert 20 * len(chunks) < passed < 34 * len(chunks)
