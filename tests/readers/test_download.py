"""The local cache of shards: what it keeps, what it gives up, what it does not believe."""

from __future__ import annotations

import fcntl
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash

import kdstore
from kdstore.errors import CorruptShardError, KDStoreError, StorageError, UsageError
from kdstore.filesystem import Folder
from kdstore.readers import cache, download
from kdstore.readers.download import ShardFiles, shard_files
from kdstore.readers.shard import ShardReader
from kdstore.readers.store import Store
from kdstore.sample import Sample
from tests.writers.test_dump import assert_same

URL = "memory://rich/store"


@pytest.fixture
def remote(rich_store: Path) -> Iterator[str]:
    """The rich store where no local path leads."""
    fs = fsspec.filesystem("memory")
    fs.put(str(rich_store), "/rich/store", recursive=True)
    yield URL
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture
def samples(rich_store: Path) -> list[Sample]:
    return list(kdstore.open(rich_store))


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of shards as they are fetched whole."""
    paths: list[str] = []
    fetch = download._download

    def recorded(handle: int, folder: Folder, record: Any) -> str:
        paths.append(folder.location(record.path))
        return fetch(handle, folder, record)

    monkeypatch.setattr(download, "_download", recorded)
    return paths


def opened(folder: Path, max_bytes: int = 1 << 30) -> Store:
    return kdstore.open(URL, cache_dir=folder, cache_bytes=max_bytes)


def check(store: Store, samples: list[Sample]) -> None:
    for one, other in zip(store, samples, strict=True):
        assert_same(one, other)


def copies(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.usefixtures("remote")
def test_shards_are_fetched_once_and_kept_by_their_hash(
    tmp_path: Path, samples: list[Sample], downloads: list[str]
) -> None:
    store = opened(tmp_path / "cache")
    check(store, samples)
    assert store[0, 1].sample_id == "row-0"
    records = [commit.shard for commit in store.commits]
    records += [c.shard for o in store.overlays.found.values() for c in o.commits.values()]
    assert len(downloads) == len(set(downloads)) == 2 * len(store.commits) + 1
    read = {path.rpartition("/")[2] for path in downloads}
    assert copies(tmp_path / "cache") == sorted(
        f"{r.xxh3_128}.parquet" for r in records if Path(r.path).name in read
    )
    for path in (tmp_path / "cache").iterdir():
        assert xxhash.xxh3_128_hexdigest(path.read_bytes()) == path.stem
    downloads.clear()
    fsspec.filesystem("memory").rm("/rich/store/data", recursive=True)
    check(opened(tmp_path / "cache"), samples)
    assert downloads == []


@pytest.mark.usefixtures("remote")
def test_planning_fetches_no_shard(
    tmp_path: Path, samples: list[Sample], downloads: list[str]
) -> None:
    """Row groups and lengths cost a footer and a column; an existing copy is read instead."""
    store = opened(tmp_path / "cache")
    assert_same(store[0], samples[0])
    downloads.clear()
    fsspec.filesystem("memory").rm(f"/rich/store/{store.commits[0].shard.path}")
    store = opened(tmp_path / "cache")
    lengths = [n for u in range(len(store.commits)) for n in store.shard(u).lengths().tolist()]
    assert lengths == [sample.num_tokens for sample in samples]
    assert store.row_groups()[-1][1] == store.find("row-59") + 1 == 60
    assert downloads == []
    assert len(copies(tmp_path / "cache")) == 2
    assert_same(store[-1], samples[-1])
    assert len(downloads) == 2


@pytest.mark.usefixtures("remote")
def test_the_environment_names_a_cache(
    tmp_path: Path, rich_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("KDSTORE_CACHE_DIR", str(folder))
    kdstore.open(rich_store)[0]
    assert not folder.exists()
    kdstore.open(URL)[0]
    assert len(copies(folder)) == 2
    monkeypatch.setenv("KDSTORE_CACHE_BYTES", "1")
    kdstore.open(URL)[-1]
    assert len(copies(folder)) == 2
    for wrong in ("many", "0", "-3", "1.5"):
        monkeypatch.setenv("KDSTORE_CACHE_BYTES", wrong)
        with pytest.raises(UsageError, match="KDSTORE_CACHE_BYTES"):
            kdstore.open(URL)
    monkeypatch.delenv("KDSTORE_CACHE_DIR")
    with pytest.raises(UsageError, match="without a cache_dir"):
        kdstore.open(URL, cache_bytes=5)
    assert shard_files(None, None) is None


@pytest.mark.usefixtures("remote")
def test_the_least_recently_used_goes_first_and_nothing_else(
    tmp_path: Path, samples: list[Sample]
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    foreign = {"notes.txt": b"mine", "0" * 31 + ".parquet": b"x" * 99, "0" * 32: b"y" * 99}
    for name, data in foreign.items():
        (folder / name).write_bytes(data)
    (folder / ("f" * 32 + ".parquet")).symlink_to(folder / "notes.txt")
    (folder / ("e" * 32 + ".parquet")).mkdir()
    store = kdstore.open(URL, overlays=[])
    sizes = [commit.shard.bytes for commit in store.commits]
    limit = sizes[0] + sizes[1] + max(sizes[1:4])
    files = ShardFiles(folder, max_bytes=limit)
    names = [f"{commit.shard.xxh3_128}.parquet" for commit in store.commits]

    def use(unit: int, when_s: int) -> None:
        files.fetch(store.folder, store.commits[unit].shard)
        os.utime(folder / names[unit], (when_s, when_s))

    def kept() -> set[int]:
        return {unit for unit, name in enumerate(names) if (folder / name).exists()}

    for unit in (0, 1, 2):
        use(unit, unit)
    use(0, 3)
    assert kept() == {0, 1, 2}
    use(3, 4)
    assert kept() in ({0, 2, 3}, {0, 3})
    assert {name: (folder / name).read_bytes() for name in foreign} == foreign
    assert (folder / ("f" * 32 + ".parquet")).is_symlink()
    assert (folder / ("e" * 32 + ".parquet")).is_dir()


@pytest.mark.usefixtures("remote")
def test_a_store_larger_than_the_cache(tmp_path: Path, samples: list[Sample]) -> None:
    """What was evicted while it is open stays readable; the limit holds whenever one is named."""
    folder = tmp_path / "cache"
    store = opened(folder)
    limit = 2 * max(commit.shard.bytes for commit in store.commits)
    store = opened(folder, limit)
    for index in [*range(0, 60, 7), *range(60)]:
        assert_same(store[index], samples[index])
        assert bytes_in(folder) <= limit
    assert len(copies(folder)) < 2 * len(store.commits)


@pytest.mark.usefixtures("remote")
def test_a_shard_larger_than_the_whole_cache_is_read_by_ranges(
    tmp_path: Path, samples: list[Sample], downloads: list[str]
) -> None:
    check(opened(tmp_path / "cache", 1000), samples)
    assert downloads == []


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

    row_hash, wrong = shard.row_hash, [1]

    def fails(*arguments: Any) -> int:
        return wrong.pop() if wrong else row_hash(*arguments)

    monkeypatch.setattr(shard, "row_hash", fails)
    store = opened(tmp_path / "cache")
    assert_same(store[0], samples[0])
    assert len(downloads) == 3
    monkeypatch.setattr(shard, "row_hash", lambda *arguments: 1)
    store = opened(tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(CorruptShardError, match=r"row hash differs\n  where: memory://rich"):
            store[0]
    assert len(downloads) == 4
    with pytest.raises(CorruptShardError, match="row hash differs"):
        kdstore.open(URL)[0]


@pytest.mark.usefixtures("remote")
def test_what_a_killed_process_left_is_overwritten(tmp_path: Path, samples: list[Sample]) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    for commit in kdstore.open(URL).commits:
        (folder / f"{commit.shard.xxh3_128}.partial").write_bytes(b"half of it" * 1000)
    check(opened(folder), samples)
    assert not list(folder.glob("*.partial"))


@pytest.mark.usefixtures("remote")
def test_abandoned_partial_files_make_room_and_others_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    store = kdstore.open(URL)
    record = store.commits[0].shard
    left, filled = (folder / f"{digit * 32}.partial" for digit in "ab")
    for path in (left, filled):
        path.write_bytes(bytes(record.bytes))
    with filled.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ShardFiles(folder, max_bytes=2 * record.bytes).fetch(store.folder, record)
    assert copies(folder) == sorted([f"{record.xxh3_128}.parquet", filled.name])


@pytest.mark.usefixtures("remote")
def test_many_threads_fetch_a_shard_once(tmp_path: Path, downloads: list[str]) -> None:
    store = kdstore.open(URL)
    files, record = ShardFiles(tmp_path / "cache", max_bytes=1 << 30), store.commits[0].shard
    start, found = threading.Barrier(8), []

    def fetch() -> None:
        start.wait(timeout=60)
        found.append(files.fetch(store.folder, record).read_ranges([(0, 4), (7, 7)]))

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[b"PAR1", b""]] * 8
    assert len(downloads) == 1
    assert copies(tmp_path / "cache") == [f"{record.xxh3_128}.parquet"]


@pytest.mark.filterwarnings("ignore:.*use of fork.*may lead to deadlocks:DeprecationWarning")
@pytest.mark.usefixtures("remote")
def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    partial = tmp_path / "file.partial"
    with download._locked(partial):
        process = os.fork()
        if process == 0:
            os._exit(len(download._LOCKED))
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.usefixtures("remote")
def test_a_hash_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    store = kdstore.open(URL)
    record = replace(store.commits[0].shard, xxh3_128="../../other")
    files = ShardFiles(tmp_path / "deep" / "cache", max_bytes=1 << 30)
    with pytest.raises(CorruptShardError, match="for an xxh3_128"):
        ShardReader(store.folder, record, store.decoder, files=files).row_group(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("remote")
def test_a_cache_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="KDSTORE_CACHE_DIR"):
        opened(tmp_path / "file")[0]

    def full(handle: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(StorageError, match="No space left"):
        opened(tmp_path / "cache")[0]
    assert copies(tmp_path / "cache") == []


def handles_in(folder: Path) -> int:
    """How many files of a folder this process has open, removed ones among them."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            count += str(link.readlink()).startswith(str(folder))
    return count


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.usefixtures("remote")
def test_few_copies_are_open_and_none_after_closing(
    tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "OPEN_SHARDS", 2)
    store = kdstore.open(URL, overlays=[], cache_dir=tmp_path / "cache")
    check(store, samples)
    assert handles_in(tmp_path) == 2
    assert pickle.loads(pickle.dumps(store))[3].sample_id == "row-3"
    store.close()
    assert handles_in(tmp_path) == 0
    assert_same(store[5], samples[5])


def test_errors_are_kdstores(tmp_path: Path, remote: str) -> None:
    Folder(remote).remove("idorder.arrow")
    with pytest.raises(KDStoreError):
        opened(tmp_path)[0]
