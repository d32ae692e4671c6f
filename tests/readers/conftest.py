"""The rich store where no local path leads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import kdstore
from kdstore.commit import ShardRecord
from kdstore.filesystem import Folder
from kdstore.readers import download
from kdstore.sample import Sample
from tests.readers.cached import URL


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

    def recorded(handle: int, folder: Folder, record: ShardRecord) -> str:
        paths.append(folder.location(record.path))
        return fetch(handle, folder, record)

    monkeypatch.setattr(download, "_download", recorded)
    return paths
