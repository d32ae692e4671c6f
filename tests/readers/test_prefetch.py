"""What is kept, what is read ahead, and that each thing is read once."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdstore
from kdstore.errors import CorruptShardError, UsageError
from kdstore.parquet import merged
from kdstore.readers.background import THREADS, Background
from kdstore.readers.cache import LastUsed
from kdstore.readers.shard import ShardReader, _StoredFile
from kdstore.readers.store import Store
from tests.hostile import copy_store
from tests.writers.test_dump import assert_same

WAIT_S = 60
FORKS = "ignore:.*use of fork.*may lead to deadlocks:DeprecationWarning"


@pytest.fixture
def store(rich_store: Path) -> Store:
    store = kdstore.open(rich_store)
    store.reserve(row_groups=200)
    return store


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(row group, thread) of every row group that is read."""
    found: list[tuple[str, str]] = []
    row_group = ShardReader.row_group

    def recorded(self: ShardReader, group: int) -> Any:
        found.append((f"{self.where} {group}", threading.current_thread().name))
        return row_group(self, group)

    monkeypatch.setattr(ShardReader, "row_group", recorded)
    return found


def finish(store: Store) -> None:
    """Waits until what was submitted is done: the jobs of a shard submit others."""
    for _ in range(3):
        done = threading.Barrier(THREADS + 1)
        for _ in range(THREADS):
            store._background.submit(lambda: done.wait(WAIT_S))  # noqa: B023
        done.wait(WAIT_S)


def test_prefetched_samples_are_read_by_other_threads_and_once(
    store: Store, rich_store: Path, reads: list[tuple[str, str]]
) -> None:
    wanted = [5, 59, (7, 1), (7, 0), 23]
    store.prefetch(wanted)
    finish(store)
    before = list(reads)
    assert before
    assert {thread for _, thread in before} == {"kdstore"}
    samples = store.__getitems__(wanted)
    assert reads == before
    assert len({group for group, _ in reads}) == len(reads)
    for index, sample in zip(wanted, samples, strict=True):
        assert_same(sample, kdstore.open(rich_store)[index])
    store.close()
    assert store[5].sample_id == "row-5"


def test_no_row_group_is_read_twice_at_once(
    store: Store, reads: list[tuple[str, str]], rich_store: Path
) -> None:
    expected = list(kdstore.open(rich_store))
    reads.clear()
    for _ in range(5):
        store.prefetch(range(60))
    for one, other in zip(store, expected, strict=True):
        assert_same(one, other)
    finish(store)
    assert len({group for group, _ in reads}) == len(reads)


def test_errors_wait_for_who_reads_the_sample(tmp_path: Path) -> None:
    store = kdstore.open(copy_store("pps-50257", tmp_path / "store"))
    shard = tmp_path / "store" / store.commits[0].shard.path
    data = shard.read_bytes()
    shard.unlink()
    store.prefetch([0])
    finish(store)
    shard.write_bytes(data)
    with pytest.raises(CorruptShardError, match="missing"):
        store[0]
    assert store[0].sample_id
    bad = bytearray(data)
    bad[4:1000] = bytes(996)
    shard.write_bytes(bad)
    store.close()
    store.prefetch([0])
    finish(store)
    shard.write_bytes(data)
    with pytest.raises(CorruptShardError):
        store[0]
    assert store[0].sample_id
    with pytest.raises(IndexError):
        store.prefetch([99_999])
    store.prefetch([(0, 7)])
    finish(store)
    with pytest.raises(UsageError, match="no draw 7"):
        store[0, 7]


def test_reading_ahead_keeps_to_half_of_the_room(
    rich_store: Path, reads: list[tuple[str, str]]
) -> None:
    store = kdstore.open(rich_store, overlays=[])
    store.prefetch(range(60))
    finish(store)
    assert len(reads) == 2
    assert len(list(store)) == 60
    assert len(store._cache._groups._values) == 4


@pytest.mark.filterwarnings(FORKS)
def test_a_forked_child_begins_empty(store: Store) -> None:
    """Also where its parent's threads hold locks and have not finished."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> Any:
        entered.set()
        leave.wait(WAIT_S)
        raise UsageError("the parent's")

    store._background.submit(lambda: store._cache._groups.prefetch(("held", 0), hold))
    entered.wait(WAIT_S)
    first = store[0].sample_id
    with store._cache._groups._lock, store._background._jobs.mutex:
        process = os.fork()
    if process == 0:
        store.prefetch(range(60))
        finish(store)
        same = store[0].sample_id == first and len(list(store)) == 60
        store.close()
        os._exit(0 if same and ("held", 0) not in store._cache._groups._values else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    leave.set()
    finish(store)
    with pytest.raises(UsageError, match="the parent's"):
        store._cache._groups.get(("held", 0), lambda: None)


def test_a_store_is_pickled_without_its_threads(store: Store) -> None:
    store.prefetch(range(60))
    copy = pickle.loads(pickle.dumps(store))
    assert copy._background._process == 0
    assert not copy._cache._groups._values
    assert copy._cache._groups._most == 200
    assert copy[3].sample_id == store[3].sample_id


EXIT = """
import sys, threading, kdstore
store = kdstore.open(sys.argv[1])
store.prefetch(range(60))
for _ in range(100):
    store._background.submit(lambda: threading.Event().wait(float(sys.argv[2])))
print(store[59].sample_id, flush=True)
"""


@pytest.mark.parametrize("stuck_s", ["0", "600"])
def test_the_interpreter_ends_whatever_is_under_way(rich_store: Path, stuck_s: str) -> None:
    command = [sys.executable, "-W", "error", "-c", EXIT, str(rich_store), stuck_s]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "row-59\n", "")


def test_threads_end_with_their_store(rich_store: Path) -> None:
    others = set(threading.enumerate())
    store = kdstore.open(rich_store)
    store.prefetch([0])
    finish(store)
    threads = set(threading.enumerate()) - others
    assert [thread.name for thread in threads] == ["kdstore"] * THREADS
    del store
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_background_does_no_more_than_fits() -> None:
    background, leave, done = Background(), threading.Event(), []
    for number in range(1000):
        background.submit(lambda n=number: (leave.wait(WAIT_S), done.append(n)))  # type: ignore[misc]
    leave.set()
    background.stop()
    assert len(done) <= THREADS
    background.submit(lambda: done.append(-1))
    background.submit(lambda: 1 // 0)
    while -1 not in done:
        threading.Event().wait(0.001)


def test_values_are_made_once_and_the_oldest_go() -> None:
    cache: LastUsed[int] = LastUsed(2)
    made: list[int] = []

    def make(value: int) -> Callable[[], int]:
        return lambda: (made.append(value), value)[1]

    def fail() -> int:
        made.append(-1)
        raise ZeroDivisionError

    assert [cache.get(key, make(key)) for key in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]
    made.clear()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.get("bad", fail)
    future = cache.prefetch("bad", fail)
    assert isinstance(future and future.exception(), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        cache.get("bad", make(5))
    assert cache.get("bad", make(5)) == 5
    assert made == [-1, -1, -1, 5]
    cache.reserve(5)
    cache.reserve(3)
    for key in range(10):
        cache.get(key, make(key))
    assert list(cache._values) == [5, 6, 7, 8, 9]


def test_lengths_and_columns_cost_one_read(
    rich_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = kdstore.open(rich_store)
    asked: list[list[tuple[int, int]]] = []
    read_ranges = _StoredFile.read_ranges

    def recorded(self: Any, ranges: list[tuple[int, int]]) -> list[bytes]:
        asked.append(list(ranges))
        return read_ranges(self, ranges)

    monkeypatch.setattr(_StoredFile, "read_ranges", recorded)
    shard = store.shard(0)
    assert shard.num_row_groups > 2
    asked.clear()
    lengths, ids = shard.lengths(), shard.column("sample_id")
    assert len(asked) == 2
    assert max(map(len, asked)) <= shard.num_row_groups
    asked.clear()
    samples = store.__getitems__(range(len(lengths)))
    own = asked[: shard.num_row_groups]
    assert [len(ranges) for ranges in own] == [1] * shard.num_row_groups
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [sample.num_tokens for sample in samples]
    assert ids == [sample.sample_id for sample in samples]


def test_lengths_that_do_not_add_up(tmp_path: Path) -> None:
    from tests.hostile import edit_json

    store = copy_store("pps-50257", tmp_path / "store")
    tokens = kdstore.open(store).commits[0].shard.tokens
    edit_json(store / "commits" / "000000.json", lambda c: c["files"][0].update(tokens=tokens + 1))
    with pytest.raises(CorruptShardError, match="tokens"):
        kdstore.open(store).shard(0).lengths()


def test_ranges_that_lie_close_become_one() -> None:
    spans = [(40, 50), (0, 10), (12, 20), (15, 18), (21, 22)]
    assert merged(spans, max_gap_bytes=0) == [(0, 10), (12, 20), (21, 22), (40, 50)]
    assert merged(spans, max_gap_bytes=2) == [(0, 22), (40, 50)]
    assert merged(spans, max_gap_bytes=18) == [(0, 50)]
    assert merged([], max_gap_bytes=5) == []
