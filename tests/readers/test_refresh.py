"""Reading a store that is still being written: snapshots, refreshing, and what tells them apart."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kdstore
from kdstore.errors import CorruptShardError, StoreMismatchError, StoreNotFoundError
from kdstore.layout import commit_path
from kdstore.readers.store import Store
from tests.hostile import edit_json
from tests.readers.test_store import shard_of

Dump = Callable[..., Path]


def ids_of(store: Store) -> list[str]:
    return [sample.sample_id for sample in store]


def test_a_dump_in_progress_is_read_as_it_was_until_refresh(dump: Dump) -> None:
    path = dump(unit="1/3")
    store = kdstore.open(path)
    before, seen, total = ids_of(store), store.fingerprint, len(store)
    copy = pickle.loads(pickle.dumps(store))
    for unit in ("2/3", "0/3"):
        dump(unit=unit)
        assert (len(store), ids_of(store), store.fingerprint) == (total, before, seen)
        now = kdstore.open(path)
        assert store.refresh() == len(now) - total > 0
        assert (ids_of(store), store.fingerprint) == (ids_of(now), now.fingerprint)
        assert store.first_rows.tolist() == now.first_rows.tolist()
        assert store.fingerprint != seen
        before, seen, total = ids_of(store), store.fingerprint, len(store)
    assert store.refresh() == 0
    assert store.is_complete
    assert ids_of(store) == [f"row-{i}" for i in range(60)]
    first = len(ids_of(copy))
    assert (copy.refresh(), len(copy), copy.fingerprint) == (60 - first, 60, store.fingerprint)


def test_samples_of_a_late_unit_come_in_their_place(dump: Dump) -> None:
    path = dump(unit="1/2")
    store = kdstore.open(path)
    first = store[0].sample_id
    dump(unit="0/2")
    store.refresh()
    assert store[0].sample_id == "row-0"
    assert store.find(first) == int(store.first_rows[1]) > 0


def test_a_refresh_keeps_to_the_columns(dump: Dump) -> None:
    path = dump(unit="1/2")
    stores = [kdstore.open(path).with_columns(["entropy"]) for _ in range(2)]
    assert stores[1][0].spans == ()  # the other has read nothing before
    dump(unit="0/2")
    for store in stores:
        store.refresh()
        sample = store[0]
        assert (sample.sample_id, sample.spans) == ("row-0", ())
        assert sample.signal is not None
        assert (list(sample.signal.scalars), sample.signal.num_entries) == (["entropy"], 0)


def test_a_refresh_of_the_empty_store(dump: Dump) -> None:
    path = dump(unit="0/2")
    shutil.move(path / "commits", path / "aside")
    store = kdstore.open(path)
    assert len(store) == 0
    shutil.move(path / "aside", path / "commits")
    assert store.refresh() == len(store) > 0
    assert store[0].sample_id == "row-0"


def test_a_refresh_sees_overlays_that_were_finished(dump: Dump) -> None:
    path = dump()
    store, without = kdstore.open(path), kdstore.open(path, overlays=())
    dump(overlay="second", draw=1)
    assert store.num_draws == 1
    assert (store.refresh(), store.num_draws) == (0, 2)
    assert (without.refresh(), without.num_draws) == (0, 1)
    assert store[5, 1].sample_id == "row-5"


def test_another_store_in_the_folder_is_refused(dump: Dump) -> None:
    path, other = dump("store"), dump("other", seed=3)
    store = kdstore.open(path)
    seen = store.fingerprint
    own = (path / "kdstore.json").read_bytes()
    shutil.copy(other / "kdstore.json", path)
    with pytest.raises(StoreMismatchError, match=r"another store now: seed differs"):
        store.refresh()
    (path / "kdstore.json").write_bytes(own)
    assert store.refresh() == 0
    shutil.move(path, path.with_name("aside"))
    with pytest.raises(StoreNotFoundError):
        store.refresh()
    shutil.move(other, path)
    with pytest.raises(StoreMismatchError, match=r"another store now: seed differs"):
        store.refresh()
    assert (len(store), store.fingerprint, store.header.identity["seed"]) == (60, seen, 0)


def test_a_fingerprint_is_of_the_shards_and_the_configuration(dump: Dump) -> None:
    path = dump("store")
    store = kdstore.open(path)
    assert re.fullmatch("[0-9a-f]{16}", store.fingerprint)
    copy = shutil.copytree(path, path.with_name("copy"))
    for manifest in copy.glob("manifest-*"):
        manifest.unlink()
    assert kdstore.open(copy).fingerprint == store.fingerprint
    assert pickle.loads(pickle.dumps(store)).fingerprint == store.fingerprint
    assert kdstore.open(dump("other", seed=3)).fingerprint != store.fingerprint


def test_a_shard_that_no_commit_names_is_no_part_of_the_store(dump: Dump) -> None:
    path = dump(unit="0/2")
    store = kdstore.open(path)
    shutil.copy(shard_of(path), path / "data" / "part-000001-0123abcd.parquet")
    (path / "data" / "part-000003-0123abcd.parquet").write_bytes(b"half a shard")
    seen = store.fingerprint
    assert (store.refresh(), store.fingerprint) == (0, seen)
    assert ids_of(kdstore.open(path)) == ids_of(store)


def test_shards_in_each_others_place_are_refused(dump: Dump) -> None:
    path = dump()
    one, other = shard_of(path, 0), shard_of(path, 1)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    store = kdstore.open(path)
    for row, shard in ((0, one), (int(store.first_rows[1]), other)):
        with pytest.raises(CorruptShardError, match=shard.name):
            store[row]


def test_outlines(dump: Dump) -> None:
    path = dump()
    store = kdstore.open(path)
    lengths = [sample.num_tokens for sample in store]
    found = [store.outline(n) for n in range(store.num_shards)]
    assert np.concatenate([outline.lengths for outline in found]).tolist() == lengths
    for n, outline in enumerate(found):
        assert (outline.lengths.dtype, outline.group_rows.dtype) == (np.int32, np.int64)
        assert outline.group_rows.sum() == len(outline.lengths) == store.shard_rows[n]
        assert outline.lengths.sum() == store.shard_tokens[n]
        assert store.outline(n) is outline
    assert pickle.loads(pickle.dumps(store)).outline(0) is not found[0]
    assert store.row_groups()[-1][1] == len(store) == store.first_rows[-1]


def test_the_last_outlines_are_kept(dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdstore.readers.outline.CACHED_OUTLINES", 2)
    store = kdstore.open(dump())
    first, second = store.outline(0), store.outline(1)
    assert store.outline(0) is first
    store.outline(2)
    assert store.outline(0) is first
    assert store.outline(1) is not second
    assert store.outline(1).lengths.tolist() == second.lengths.tolist()


def test_lengths_that_were_not_committed(dump: Dump) -> None:
    path = dump()
    for manifest in path.glob("manifest-*"):
        manifest.unlink()
    edit_json(path / commit_path(1), lambda content: content["files"][0].update(tokens=7))
    store = kdstore.open(path)
    store.outline(0)
    with pytest.raises(CorruptShardError, match=r"number of tokens\n.*part-000001"):
        store.outline(1)
