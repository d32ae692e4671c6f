"""The local cache of shards: what it keeps, what it gives up, what it does not believe."""

from __future__ import annotations

import fcntl
import os
import pickle
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import xxhash

import kdstore
from kdstore.errors import CorruptShardError, KDStoreError, StorageError, UsageError
from kdstore.filesystem import Folder
from kdstore.readers import cache, download
from kdstore.readers.download import ShardFiles, shard_files
from kdstore.readers.shard import ShardReader
from kdstore.sample import Sample
from tests.readers.cached import URL, bytes_in, check, copies, opened
from tests.writers.test_dump import assert_same


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
