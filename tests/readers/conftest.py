"""The rich store where no local path leads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
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
def dump(dump: Callable[..., Path], plain_store: Path, tmp_path: Path) -> Callable[..., Path]:
    """As elsewhere, but the store of a plain ``dump()`` is copied: here it is only read."""

    def run(name: str = "store", **options: object) -> Path:
        if options or name != "store" or (tmp_path / name).exists():
            return dump(name, **options)
        return Path(shutil.copytree(plain_store, tmp_path / name))

    return run


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
