"""Reading: random access, processes, damage."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import kdstore
from kdstore.commit import Commit
from kdstore.errors import CorruptShardError, HeaderError, KDStoreError, StoreNotFoundError
from kdstore.layout import commit_path

Dump = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


def shard_of(store: Path, unit: int = 0) -> Path:
    data = (store / commit_path(unit)).read_bytes()
    return store / Commit.from_bytes(data, where="test").shard.path


def test_random_access_and_order(dump: Dump) -> None:
    store = kdstore.open(dump())
    assert len(store) == 60
    assert store[-1].sample_id == "row-59"
    assert [s.sample_id for s in store.__getitems__([5, 59, 5, 0])] == [
        "row-5",
        "row-59",
        "row-5",
        "row-0",
    ]
    assert store.find("row-31") == 31
    with pytest.raises(IndexError):
        store[60]
    with pytest.raises(KeyError):
        store.find("row-60")


def test_a_store_can_be_pickled_after_use(dump: Dump) -> None:
    store = kdstore.open(dump())
    first = store[3]
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy[3].input_ids_T, first.input_ids_T)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_plain_torch_dataloader(dump: Dump, start: str) -> None:
    store = kdstore.open(dump())
    store[0]
    loader = torch.utils.data.DataLoader(
        store,  # type: ignore[arg-type]
        batch_size=7,
        collate_fn=kdstore.Collator(),
        num_workers=2,
        multiprocessing_context=start,
    )
    seen = [sample_id for batch in loader for sample_id in batch.sample_ids]
    assert seen == [f"row-{i}" for i in range(60)]


def test_token_table_decodes_what_was_dumped(dump: Dump, data_file: Path) -> None:
    store = kdstore.open(dump())
    text = json.loads(data_file.read_text().splitlines()[4])["text"]
    decoded = store.token_table().decode(store[4].input_ids_T)
    assert decoded.decode().removesuffix("<eos>") == text


def test_stored_tokenizer_loads(dump: Dump, tmp_path: Path, teacher_dir: Path) -> None:
    from transformers import AutoTokenizer

    kdstore.open(dump()).copy_tokenizer(tmp_path / "copy")
    stored, original = map(AutoTokenizer.from_pretrained, (tmp_path / "copy", teacher_dir))
    assert stored("in the dark").input_ids == original("in the dark").input_ids
    assert stored.eos_token_id == original.eos_token_id


def test_stores_in_memory_read_the_same(dump: Dump) -> None:
    import fsspec

    local = dump()
    fs = fsspec.filesystem("memory")
    fs.put(str(local), "/copied", recursive=True)
    copy = kdstore.open("memory://copied")
    for one, other in zip(kdstore.open(local), copy, strict=True):
        assert one.sample_id == other.sample_id
        np.testing.assert_array_equal(one.signal.ids_N, other.signal.ids_N)  # type: ignore[union-attr]
    fs.rm("/copied", recursive=True)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="kdstore dump"):
        kdstore.open(tmp_path / "nothing")


@pytest.mark.parametrize("version", ["1.1", "1.25"])
def test_a_later_minor_version_is_read(dump: Dump, version: str) -> None:
    """What an older reader must not ignore is a feature, and refused by its name."""
    store = dump()
    header = json.loads((store / "kdstore.json").read_text())
    assert header["format_version"] == "1.0"
    (store / "kdstore.json").write_text(json.dumps({**header, "format_version": version}))
    assert len(kdstore.open(store)) == 60
    assert kdstore.open(store).header.format_version == version


@pytest.mark.parametrize(
    "version",
    ["9.0", "2.0", "0.2", "0.0", "1", "1.0.0", "1.0 ", "01.0", "1.0\n", "1.٣", 1.0, 7, None],
)
def test_another_format_version_is_refused(dump: Dump, version: object) -> None:
    store = dump()
    header = json.loads((store / "kdstore.json").read_text())
    (store / "kdstore.json").write_text(json.dumps({**header, "format_version": version}))
    with pytest.raises(HeaderError, match="format version"):
        kdstore.open(store)


def test_an_unknown_feature_is_refused_by_name(dump: Dump) -> None:
    store = dump()
    header = json.loads((store / "kdstore.json").read_text())
    header["reader_features"] = ["holograms"]
    (store / "kdstore.json").write_text(json.dumps(header))
    with pytest.raises(HeaderError, match="holograms"):
        kdstore.open(store)


def test_an_edited_identity_is_refused(dump: Dump) -> None:
    store = dump()
    text = (store / "kdstore.json").read_text()
    (store / "kdstore.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(HeaderError, match="digest"):
        kdstore.open(store)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_a_header_that_is_no_header(dump: Dump, content: bytes) -> None:
    store = dump()
    (store / "kdstore.json").write_bytes(content)
    with pytest.raises(HeaderError):
        kdstore.open(store)


def test_a_commit_that_points_outside_is_refused(dump: Dump) -> None:
    store = dump()
    for manifest in store.glob("manifest-*"):
        manifest.unlink()
    commit = store / commit_path(0)
    commit.write_text(commit.read_text().replace("data/part-", "../part-"))
    with pytest.raises(HeaderError, match="no path of a shard"):
        kdstore.open(store)


def test_a_truncated_shard(dump: Dump, kdstore_cli: Run) -> None:
    store = dump()
    shard = shard_of(store)
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CorruptShardError, match="size"):
        kdstore.open(store)[0]
    code, output, _ = kdstore_cli("verify", "--json", "--quiet", store)
    report = json.loads(output)
    assert (code, report["ok"]) == (1, False)
    assert shard.name in "".join(report["problems"])


def test_a_deleted_shard(dump: Dump, kdstore_cli: Run) -> None:
    store = dump()
    shard_of(store).unlink()
    with pytest.raises(CorruptShardError, match="missing"):
        kdstore.open(store)[0]
    code, _, error = kdstore_cli("verify", "--quiet", store)
    assert code == 1
    assert "missing" in error


def test_any_flipped_bit_is_found(dump: Dump) -> None:
    """By verify, and by a plain read of all samples unless only unread bytes are hit."""
    from kdstore.readers.verify import verify_store

    store = dump()
    shard = shard_of(store)
    good = shard.read_bytes()
    reference = [s.signal for s in kdstore.open(store)]
    generator = np.random.default_rng(0)
    for bit in generator.integers(0, 8 * len(good), 60).tolist():
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        shard.write_bytes(bad)
        assert not verify_store(kdstore.open(store)).ok, bit
        try:
            samples = list(kdstore.open(store))
        except KDStoreError:
            continue
        for sample, want in zip(samples, reference, strict=True):
            np.testing.assert_array_equal(sample.signal.ids_N, want.ids_N)  # type: ignore[union-attr]
            np.testing.assert_array_equal(sample.signal.logprobs_N, want.logprobs_N)  # type: ignore[union-attr]


def test_a_shard_of_another_store_is_refused(dump: Dump) -> None:
    one, other = dump("one"), dump("other", seed=3)
    shard_of(one).write_bytes(shard_of(other).read_bytes())
    with pytest.raises(CorruptShardError):
        kdstore.open(one)[0]


def test_swapped_tokenizer_and_id_order_are_found(dump: Dump, kdstore_cli: Run) -> None:
    store = dump()
    table = store / "tokenizer" / "tokenizer.json"
    table.write_bytes(table.read_bytes() + b" ")
    assert kdstore_cli("verify", "--quiet", store)[0] == 1
    (store / "idorder.arrow").write_bytes(b"nothing")
    with pytest.raises(HeaderError, match="id order"):
        kdstore.open(store)[0]


def test_an_unfinished_store_does_not_verify(dump: Dump, kdstore_cli: Run) -> None:
    store = dump(unit="0/2")
    code, output, _ = kdstore_cli("verify", "--json", "--quiet", store)
    assert code == 1
    assert "unfinished" in json.loads(output)["problems"][0]
    code, output, _ = kdstore_cli("status", "--json", store)
    assert code == 0
    assert not json.loads(output)["complete"]


def test_a_store_without_commits_is_empty(dump: Dump) -> None:
    store_path = dump(unit="0/2")
    for path in (store_path / "commits").iterdir():
        path.unlink()
    store = kdstore.open(store_path)
    assert len(store) == 0
    assert list(store.loader(batch_size=2)) == []


def test_a_commit_may_say_more_than_this_version_knows(dump: Dump, kdstore_cli: Run) -> None:
    store = dump()
    commit = store / commit_path(0)
    commit.write_text(json.dumps({**json.loads(commit.read_text()), "mood": "sunny"}))
    assert kdstore_cli("verify", "--quiet", store)[0] == 0


def test_a_commit_that_differs_from_the_manifest_is_found(dump: Dump, kdstore_cli: Run) -> None:
    store = dump()
    commit = store / commit_path(0)
    content = json.loads(commit.read_text())
    content["statistics"]["kept_mass"] = 0.5
    commit.write_text(json.dumps(content))
    code, _, error = kdstore_cli("verify", "--quiet", store)
    assert code == 1
    assert "manifest and commit file differ" in error
