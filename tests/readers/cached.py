"""The rich store in memory, read through a local cache of shards."""

from __future__ import annotations

from pathlib import Path

import kdstore
from kdstore.readers.store import Store
from kdstore.sample import Sample
from tests.writers.test_dump import assert_same

URL = "memory://rich/store"


def opened(folder: Path, max_bytes: int = 1 << 30) -> Store:
    return kdstore.open(URL, cache_dir=folder, cache_bytes=max_bytes)


def check(store: Store, samples: list[Sample]) -> None:
    for one, other in zip(store, samples, strict=True):
        assert_same(one, other)


def copies(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
