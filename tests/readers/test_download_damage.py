"""Damage in the local cache is mended, damage in the store is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kdstore
from kdstore.errors import CorruptShardError
from kdstore.filesystem import Folder
from kdstore.readers import download
from kdstore.sample import Sample
from tests.readers.cached import URL, check, opened
from tests.writers.test_dump import assert_same


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 16
    path.write_bytes(data)


DAMAGES = {
    **{f"a bit at {place}": place for place in (0.0, 0.1, 0.35, 0.6, 0.9, 0.97, 1.0)},
    "truncated": -1,
    "emptied": -2,
    "longer": -3,
    "swapped": -4,
}


def damage(path: Path, kind: float) -> None:
    if kind >= 0:
        flip(path, kind)
        return
    data = path.read_bytes()
    changed = {-1: data[:-5], -2: b"", -3: data + b"x", -4: data[::-1]}
    path.write_bytes(changed[int(kind)])


@pytest.mark.usefixtures("remote")
@pytest.mark.parametrize("kind", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("when", ["before", "while open"])
def test_a_damaged_copy_is_fetched_again(
    tmp_path: Path, samples: list[Sample], downloads: list[str], kind: float, when: str
) -> None:
    """In one file and in many; damage that no read meets, as in a page index, may stay."""
    folder = tmp_path / "cache"
    store = kdstore.open(URL, overlays=[], cache_dir=folder, cache_bytes=1 << 30)
    check(store, samples)
    if when == "before":
        store.close()
    else:
        store._cache._groups.clear()
    downloads.clear()
    for path in folder.iterdir():
        damage(path, kind)
    check(store, samples)
    lengths = [n for u in range(len(store.commits)) for n in store.shard(u).lengths().tolist()]
    assert lengths == [sample.num_tokens for sample in samples]
    assert len(downloads) == len(set(downloads)) <= len(store.commits)
    if kind < 0 and when == "before":
        assert len(downloads) == len(store.commits)
    again = kdstore.open(URL, overlays=[], cache_dir=folder, cache_bytes=1 << 30)
    check(again, samples)


def test_a_store_that_is_damaged_itself_is_an_error(tmp_path: Path, remote: str) -> None:
    folder = Folder(remote)
    path = kdstore.open(remote).commits[1].shard.path
    data = bytearray(folder.read(path))
    for bad, match in ((data[:-3], "size differs"), (None, "missing")):
        if bad is None:
            folder.remove(path)
        else:
            folder.replace(path, bytes(bad))
        with pytest.raises(CorruptShardError, match=match) as info:
            list(opened(tmp_path / "cache"))
        assert folder.location(path) in str(info.value)
    data[len(data) // 3] ^= 1
    folder.replace(path, bytes(data))
    store = opened(tmp_path / "cache")
    with pytest.raises(CorruptShardError, match="xxh3_128 is"):
        list(store)
    assert not list((tmp_path / "cache").glob("*.partial"))
    assert not (tmp_path / "cache" / f"{store.commits[1].shard.xxh3_128}.parquet").exists()


@pytest.mark.usefixtures("remote")
def test_bytes_that_arrive_wrong_are_fetched_again(
    tmp_path: Path, samples: list[Sample], downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the right length, so that only the hash of the whole tells."""
    monkeypatch.setattr(download, "_RANGE_BYTES", 1000)
    read_ranges, wrong = Folder.read_ranges, ["once", "twice"]

    def garbled(self: Folder, path: str, ranges: Any) -> list[bytes]:
        found = read_ranges(self, path, ranges)
        if len(found) == 4 and ranges[0][0] == 0 and wrong and wrong.pop():
            found[1] = found[1][::-1]
        return found

    monkeypatch.setattr(Folder, "read_ranges", garbled)
    store = kdstore.open(URL, overlays=[], cache_dir=tmp_path / "cache")
    check(store, samples)
    assert len(downloads) == len(store.commits) + 2
    assert downloads[0] == downloads[1] == downloads[2]


@pytest.mark.usefixtures("remote")
def test_a_row_hash_that_differs_is_healed_or_told(
    tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, downloads: list[str]
) -> None:
    """Page checksums hold, the row hash does not: once, then always."""
    from kdstore.readers import shard

    row_hashes, wrong = shard.row_hashes, [1]

    def fails(*arguments: Any) -> list[int]:
        return [wrong.pop()] if wrong else row_hashes(*arguments)

    monkeypatch.setattr(shard, "row_hashes", fails)
    store = opened(tmp_path / "cache")
    assert_same(store[0], samples[0])
    assert len(downloads) == 3
    monkeypatch.setattr(shard, "row_hashes", lambda *arguments: [1])
    store = opened(tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(CorruptShardError, match=r"row hash differs\n  where: memory://rich"):
            store[0]
    assert len(downloads) == 4
    with pytest.raises(CorruptShardError, match="row hash differs"):
        kdstore.open(URL)[0]
