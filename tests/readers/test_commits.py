"""The commits of an opened store: columns of all, and each as an object when it is asked for."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import kdstore
from kdstore.commit import Commit
from kdstore.commits import Commits, CommitsByUnit
from kdstore.errors import HeaderError
from kdstore.layout import commit_path, manifest_path
from kdstore.manifest import Manifest, manifest_bytes
from kdstore.readers.stats import store_stats
from kdstore.readers.store import Store

Dump = Callable[..., Path]


def commit_files(store: Path) -> list[Commit]:
    """What the files of a finished store's units say."""
    paths = sorted((store / "commits").iterdir())
    return [Commit.from_bytes(path.read_bytes(), where="test") for path in paths]


def check_same(found: Commits, want: list[Commit]) -> None:
    assert list(found) == want
    assert len(found) == len(want)
    assert found.units.tolist() == [commit.unit for commit in want]
    for index, commit in enumerate(want):
        assert found[index] == commit == found[index - len(want)]
        assert found.record(index) == commit.shard
    for name, value in asdict(want[0].shard).items():
        values = [getattr(commit.shard, name) for commit in want]
        if isinstance(value, str):
            assert found.texts(name) == values
        else:
            assert found.numbers(name).dtype == np.int64
            assert found.numbers(name).tolist() == values


def test_commits_of_a_manifest_of_files_and_of_both(dump: Dump) -> None:
    path = dump()
    want = commit_files(path)
    assert len(want) > 3
    check_same(kdstore.open(path).commits, want)
    (path / manifest_path(len(want))).unlink()
    check_same(kdstore.open(path).commits, want)
    (path / manifest_path(2)).write_bytes(manifest_bytes([want[2], want[0]]))
    for unit in (0, 2):
        (path / commit_path(unit)).unlink()
    store = kdstore.open(path)
    check_same(store.commits, want)
    check_same(pickle.loads(pickle.dumps(store)).commits, want)
    assert [sample.sample_id for sample in store] == [f"row-{i}" for i in range(60)]


def test_commits_are_a_sequence(dump: Dump) -> None:
    path = dump()
    want, store = commit_files(path), kdstore.open(path)
    assert store.commits[1:3] == want[1:3]
    assert store.commits[::-1] == want[::-1]
    assert want[2] in store.commits
    for index in (len(want), -len(want) - 1):
        with pytest.raises(IndexError):
            store.commits[index]


def test_commits_of_an_overlay_by_unit(dump: Dump) -> None:
    path = dump()
    dump(overlay="second", draw=1)
    overlay = path / "overlays" / "second"
    for file in (*overlay.glob("manifest-*"), overlay / commit_path(1)):
        file.unlink()
    want = {commit.unit: commit for commit in commit_files(overlay)}
    found = kdstore.open(path).overlays.found["second"].commits
    assert isinstance(found, CommitsByUnit)
    assert dict(found) == want
    assert (0 in found, 1 in found, -1 in found, "0" in found) == (True, False, False, False)
    assert found.get(1) is None
    assert found.record(2) == want[2].shard
    for unit in (1, 1000):
        with pytest.raises(KeyError):
            found[unit]
    assert found.covers(np.array([0, 2]))
    assert not found.covers(np.array([0, 1]))
    assert found.covers(np.zeros(0, np.int64))


def test_a_store_without_commits_has_none(dump: Dump) -> None:
    path = dump(unit="0/2")
    shutil.rmtree(path / "commits")
    store = kdstore.open(path)
    assert (len(store.commits), len(store), store.num_shards) == (0, 0, 0)
    assert store.first_rows.tolist() == [0]
    assert list(store.commits) == store.commits[:] == []
    assert store_stats(store)["num_tokens"] == 0


def test_opening_and_reading_parse_no_json_of_a_manifest(
    dump: Dump, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dump()
    dump(overlay="second", draw=1)
    asked: list[int] = []
    read = Manifest.json
    monkeypatch.setattr(Manifest, "json", lambda self, row: asked.append(row) or read(self, row))
    store = kdstore.open(path)
    assert store[3, 1].sample_id == "row-3"
    assert store.outline(0).lengths[3] == store[3].num_tokens
    assert (store.is_complete, store.refresh(), asked) == (True, 0, [])
    assert store.commits[2].unit == 2
    assert asked == [2]


def test_what_is_pickled_has_no_unpacked_json(dump: Dump) -> None:
    store = kdstore.open(dump())
    before = len(pickle.dumps(store))
    assert store.commits[0].provenance["backend"] == "hf"
    assert len(pickle.dumps(store)) == before


def test_a_file_that_changes_after_opening_changes_nothing(dump: Dump) -> None:
    path = dump()
    want = commit_files(path)
    for manifest in path.glob("manifest-*"):
        manifest.unlink()
    store = Store(kdstore.open(path).folder)
    (path / commit_path(1)).write_text("{}")
    assert store.commits[1] == want[1]
    with pytest.raises(HeaderError, match="damaged commit"):
        store.refresh()
    assert store.commits[1] == want[1]
