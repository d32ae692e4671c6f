"""The rich store read from S3 in every way, by ranges and through a local cache, and badly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
from torch.utils.data import DataLoader

import kdstore
from kdstore import retry
from kdstore.readers.sampler import EpochSampler
from kdstore.readers.store import Store
from kdstore.sample import Sample
from tests.s3.conftest import Remote
from tests.s3.proxy import FaultProxy, serving
from tests.writers.test_dump import assert_same

WAIT_S = 120
FORKS = "ignore:.*use of fork.*may lead to deadlocks:DeprecationWarning"


@pytest.fixture(params=["ranges", "cache"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Options of ``kdstore.open``: a local cache of some shards, or none."""
    if request.param == "ranges":
        return {}
    return {"cache_dir": tmp_path / "cache", "cache_bytes": 600_000}


def check_same(samples: list[Sample], others: list[Sample]) -> None:
    for one, other in zip(samples, others, strict=True):
        assert_same(one, other)


def check_all(store: Store, local: Store) -> None:
    """Every way to read a store gives what it gives locally."""
    expected = list(local)
    for index in (17, -1, 0, 59, 18):
        assert_same(store[index], expected[index])
    check_same(list(store), expected)
    wanted: list[Any] = [(40, 1), 3, (3, 1), 3, 59]
    store.prefetch(wanted)
    check_same(store.__getitems__(wanted), local.__getitems__(wanted))
    assert "lse" in store[0].signal.scalars  # type: ignore[union-attr]
    audit, local_audit = store.with_signal("audit"), local.with_signal("audit")
    check_same(list(audit), list(local_audit))
    for unit in range(len(store.commits)):
        np.testing.assert_array_equal(store.shard(unit).lengths(), local.shard(unit).lengths())
    assert store.row_groups() == local.row_groups()
    options = {"batch_tokens": 200, "pack": True, "seed": 3}
    for batch, other in zip(store.loader(**options), local.loader(**options), strict=True):
        assert batch.sample_ids == other.sample_ids
        np.testing.assert_array_equal(batch.input_ids, other.input_ids)
        np.testing.assert_array_equal(batch.signal.logprobs_N, other.signal.logprobs_N)


def test_every_way_of_reading(remote: Remote, rich_store: Path, cache: dict[str, Any]) -> None:
    store = kdstore.open(remote.url, **cache, **remote.options())
    check_all(store, kdstore.open(rich_store))
    store.close()


def test_a_server_that_fails_again_and_again(
    remote: Remote,
    rich_store: Path,
    cache: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One answer in four is bad, and only our own retries are there to mend it."""
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    config = {"retries": {"max_attempts": 0}, "read_timeout": 1}
    with serving(FaultProxy(remote.address, seed=1, stall_at=50)) as proxy:
        options = {**remote.options(proxy.address), "config_kwargs": config}
        store = kdstore.open(remote.url, **cache, **options)
        store.reserve(row_groups=50)
        check_all(store, kdstore.open(rich_store))
        store.close()
    assert set(proxy.faults) == {"503", "reset", "cut", "short", "stall"}
    assert proxy.faults["503"] >= proxy._count / 15


@pytest.mark.parametrize("server", ["moto"])
def test_a_dead_server_is_an_error(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """In mid-reading, also of what was to be read in the background."""
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    config = {"retries": {"max_attempts": 0}}
    with serving(FaultProxy(remote.address, seed=0)) as proxy:
        proxy.fault = lambda request: None  # type: ignore[method-assign]
        options = {**remote.options(proxy.address), "config_kwargs": config}
        store = kdstore.open(remote.url, **options)
        first = store[0].sample_id
    store.prefetch([59])
    for _ in range(2):
        with pytest.raises(kdstore.KDStoreError, match=r"cannot (read|open)"):
            store[59]
    assert store[0].sample_id == first


def samples_only(samples: list[Sample]) -> list[Sample]:
    return samples


def by_torch(store: Store, **options: Any) -> list[Sample]:
    loader = DataLoader(
        store,  # type: ignore[arg-type]
        batch_size=7,
        collate_fn=samples_only,
        timeout=WAIT_S,
        **options,
    )
    return [sample for batch in loader for sample in batch]


@pytest.mark.filterwarnings(FORKS)
@pytest.mark.parametrize("server", ["moto"])
@pytest.mark.parametrize(("context", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_workers_read_through_a_cache(
    remote: Remote, rich_store: Path, tmp_path: Path, context: str, num_workers: int
) -> None:
    """Forked while the parent reads ahead, into a folder that holds two shards or so."""
    options = {"cache_dir": tmp_path / "cache", "cache_bytes": 250_000, **remote.options()}
    store = kdstore.open(remote.url, **options)
    expected = list(kdstore.open(rich_store))
    store.prefetch(range(60))
    read = by_torch(store, num_workers=num_workers, multiprocessing_context=context)
    check_same(read, expected)
    sampler = EpochSampler(store, seed=4)
    shuffled = by_torch(
        store, sampler=sampler, num_workers=num_workers, multiprocessing_context=context
    )
    assert sorted(s.sample_id for s in shuffled) == sorted(s.sample_id for s in expected)
    check_same(list(store), expected)


@pytest.mark.parametrize("server", ["moto"])
def test_a_row_group_is_one_request(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, requests: Callable[[], list[str]]
) -> None:
    store = kdstore.open(remote.url, overlays=[], **remote.options())
    shard = store.shard(0)
    before = len(requests())
    shard.row_group(1)
    assert requests()[before:] == ["get_object"]
    shard.lengths()
    assert requests()[before + 1 :] == ["get_object"]  # row groups of less than the gap


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    calls: list[str] = []
    send = s3fs.S3FileSystem._call_s3

    async def record(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        calls.append(method)
        return await send(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", record)
    return lambda: calls
