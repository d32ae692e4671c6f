"""Reading overlays: draws by epoch, processes, damage, and what is said of them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kdstore
from kdstore.errors import CorruptShardError, HeaderError, KDStoreError, UsageError
from kdstore.hashing import json_digest
from kdstore.layout import commit_path
from kdstore.readers.sampler import EpochSampler
from kdstore.readers.shard import ShardReader
from kdstore.readers.store import Store
from kdstore.readers.verify import verify_store
from kdstore.sample import Sample
from kdstore.writers.overlay import OverlayWriter, add_scalar
from tests.conftest import run_dump
from tests.readers.test_store import shard_of
from tests.writers.test_dump import assert_same

Dump = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
IDENTITY = {
    "store": "",
    "signal": "main",
    "codec": "scalars/1",
    "draw": 0,
    "scalars": ["lse"],
    "columns": [],
    "seed": 0,
}


@pytest.fixture(scope="module")
def overlaid(
    tmp_path_factory: pytest.TempPathFactory, plain_store: Path, teacher_dir: Path, data_file: Path
) -> Path:
    """A store with draws 1 and 2, and a scalar."""
    path = tmp_path_factory.mktemp("overlaid") / "store"
    shutil.copytree(plain_store, path)
    common: list[object] = ["--teacher", teacher_dir, "--data", data_file, "--out", path]
    for options in ("second --draw 1", "a-third --draw 2", "lse --scalars lse"):
        run_dump(*common, "--unit-tokens", 500, "--overlay", *options.split())
    return path


@pytest.fixture
def store(overlaid: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(overlaid, tmp_path / "store"))


def without_a_unit(store: Path, name: str) -> Path:
    """The folder of an overlay, after its unit 1 and its manifest were lost."""
    overlay = store / "overlays" / name
    for path in (*overlay.glob("manifest-*"), overlay / commit_path(1)):
        path.unlink()
    return overlay


def entries(sample: Sample) -> list[object]:
    assert sample.signal is not None
    return [sample.signal.ids_N.tolist(), sample.signal.logprobs_N.tolist()]


def test_the_loader_takes_the_draws_in_turn(store: Path) -> None:
    opened = kdstore.open(store)
    assert opened.num_draws == 3
    loader = opened.loader(batch_size=60, epochs=4, seed=5)
    for epoch, batch in enumerate(loader):
        indices = [opened.find(name) for name in batch.sample_ids]
        want = [opened[index, epoch % 3].signal.ids_N for index in indices]  # type: ignore[union-attr]
        np.testing.assert_array_equal(batch.signal.ids_N.numpy(), np.concatenate(want))
        assert "lse" in batch.signal.scalars
    first, fourth = (list(opened.loader(batch_size=60, epochs=4, shuffle=False))[e] for e in (0, 3))
    torch.testing.assert_close(first.signal.ids_N, fourth.signal.ids_N, rtol=0, atol=0)
    fixed = list(opened.loader(batch_size=60, epochs=2, shuffle=False, draw=1))
    want = [opened[index, 1].signal.ids_N for index in range(60)]  # type: ignore[union-attr]
    for batch in fixed:
        np.testing.assert_array_equal(batch.signal.ids_N.numpy(), np.concatenate(want))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_sampler_takes_the_draws_in_turn_in_workers(store: Path, start: str) -> None:
    opened = kdstore.open(store)
    opened[0, 2]
    sampler = EpochSampler(opened, seed=0)
    loader = torch.utils.data.DataLoader(
        opened,  # type: ignore[arg-type]
        batch_size=30,
        sampler=sampler,
        collate_fn=list,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context=start,
    )
    for epoch in (1, 2, 3):
        sampler.set_epoch(epoch)
        for sample in (sample for batch in loader for sample in batch):
            assert_same(sample, opened[opened.find(sample.sample_id), epoch % 3])


def test_an_epoch_reads_each_row_group_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = kdstore.open(store)
    read: list[str] = []
    row_group = ShardReader.row_group
    monkeypatch.setattr(
        ShardReader,
        "row_group",
        lambda self, group: read.append(f"{self.where} {group}") or row_group(self, group),
    )
    list(opened.loader(batch_size=7, seed=1, draw=1))
    assert len(read) == len(set(read)) == 3 * opened.header.num_units


def test_a_store_of_one_draw_gives_plain_indices(dump: Dump) -> None:
    opened = kdstore.open(dump())
    assert opened.num_draws == 1
    assert sorted(EpochSampler(opened, seed=0)) == list(range(60))  # type: ignore[type-var]
    with pytest.raises(UsageError, match="no draw 1"):
        opened[0, 1]


def test_draws_are_counted_up_to_a_gap(store: Path) -> None:
    shutil.rmtree(store / "overlays" / "second")
    opened = kdstore.open(store)
    assert opened.num_draws == 1
    assert entries(opened[3, 2]) != entries(opened[3])
    with pytest.raises(UsageError, match="no draw 1"):
        opened[3, 1]


def test_a_pickled_store_reads_its_overlays(store: Path) -> None:
    opened = kdstore.open(store)
    first = opened[3, 1]
    assert_same(pickle.loads(pickle.dumps(opened))[3, 1], first)
    opened.close()
    assert_same(opened[3, 1], first)
    assert_same(opened.__getitems__([4, (3, 1)])[1], first)


def test_overlays_in_memory_read_the_same(store: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.put(str(store), "/copied", recursive=True)
    local, copy = kdstore.open(store), kdstore.open("memory://copied")
    for index in range(60):
        assert_same(local[index, 2], copy[index, 2])
    fs.rm("/copied", recursive=True)


def test_overlays_may_be_chosen(store: Path) -> None:
    for names, scalars, draws in ((["second"], False, 2), (["lse"], True, 1), ([], False, 1)):
        opened = kdstore.open(store, overlays=names)
        assert ("lse" in opened[0].signal.scalars) == scalars  # type: ignore[union-attr]
        assert opened.num_draws == draws
    without_a_unit(store, "lse")
    for name, found in (("lse", "3 of 4 units"), ("nothing", "no such"), ("../data", "no such")):
        with pytest.raises(UsageError, match=found):
            kdstore.open(store, overlays=[name])


def test_an_incomplete_overlay_is_not_read_but_named(store: Path, kdstore_cli: Run) -> None:
    units = kdstore.open(store).header.num_units
    for name in ("lse", "second"):
        without_a_unit(store, name)
    opened = kdstore.open(store)
    assert "lse" not in opened[0].signal.scalars  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=f"{units - 1} of {units} units"):
        opened[0, 1]
    code, output, _ = kdstore_cli("status", "--json", store)
    progress = f"{units - 1} of {units} units"
    whole = f"{units} of {units} units"
    assert json.loads(output)["overlays"] == {"a-third": whole, "lse": progress, "second": progress}
    code, output, _ = kdstore_cli("inspect", "--json", store)
    assert code == 0
    assert json.loads(output)["overlays"]["second"]["units"] == progress
    assert json.loads(output)["overlays"]["second"]["draw"] == 1
    code, _, error = kdstore_cli("verify", "--quiet", store)
    assert code == 1
    assert error.count("problem:") == 2
    assert f"overlay second is unfinished: {progress}" in error


def test_a_unit_that_the_store_lost_hides_no_overlay(store: Path) -> None:
    """An overlay that has every committed unit can be read; rows are found by unit."""
    want = [(s.sample_id, entries(s)) for s in map(kdstore.open(store).__getitem__, draw_1(60))]
    for path in (*store.glob("manifest-*"), store / commit_path(2)):
        path.unlink()
    opened = kdstore.open(store)
    found = [(s.sample_id, entries(s)) for s in map(opened.__getitem__, draw_1(len(opened)))]
    assert 40 < len(found) < 60
    assert [pair for pair in want if pair in found] == found


def draw_1(count: int) -> list[tuple[int, int]]:
    return [(index, 1) for index in range(count)]


@pytest.mark.parametrize(("name", "draw"), [("second", 1), ("lse", 0)])
def test_any_flipped_bit_is_found(store: Path, name: str, draw: int) -> None:
    """By verify, and by a plain read of all samples unless only unread bytes are hit."""
    shard = shard_of(store / "overlays" / name)
    good = shard.read_bytes()
    opened = kdstore.open(store)
    reference = [opened[index, draw] for index in range(60)]
    generator = np.random.default_rng(0)
    for bit in generator.integers(0, 8 * len(good), 25).tolist():
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        shard.write_bytes(bad)
        report = verify_store(kdstore.open(store))
        assert not report.ok, bit
        assert len(report.problems) < 4
        try:
            damaged = kdstore.open(store)
            samples = [damaged[index, draw] for index in range(60)]
        except KDStoreError:
            continue
        for sample, want in zip(samples, reference, strict=True):
            assert_same(sample, want)


def test_rows_must_be_those_of_the_shard(store: Path) -> None:
    """The overlay's own hashes hold, but it is another unit's: each row is checked against its."""
    overlay = store / "overlays" / "second"
    for path in overlay.glob("manifest-*"):
        path.unlink()
    one, other = (json.loads((overlay / commit_path(unit)).read_text()) for unit in (0, 1))
    (overlay / commit_path(0)).write_text(json.dumps({**other, "unit": 0}))
    opened = kdstore.open(store)
    with pytest.raises(CorruptShardError, match=r"row 0[\s\S]*sample_id[\s\S]*row-0") as caught:
        opened[0, 1]
    assert other["files"][0]["path"] in str(caught.value)
    assert one["files"][0]["path"] not in str(caught.value)
    assert not verify_store(opened).ok


def test_a_shard_with_too_few_rows(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row_groups = OverlayWriter.row_groups
    monkeypatch.setattr(
        OverlayWriter,
        "row_groups",
        lambda self, unit, samples: [group[:-1] for group in row_groups(self, unit, samples)],
    )
    add_scalar(store, "short", lambda sample: np.zeros(sample.num_scored, np.float32))
    opened = kdstore.open(store)
    last = opened.commits[0].shard.rows - 1
    assert "short" in opened[last - 1].signal.scalars  # type: ignore[union-attr]
    with pytest.raises(CorruptShardError, match=rf"no such row[\s\S]*row {last}"):
        opened[last]
    problems = "".join(verify_store(opened).problems)
    assert "the store's shard has" in problems
    assert "no such row" in problems


@pytest.mark.parametrize("codec", ["runes/1", "scalars/1"])
def test_a_codec_that_has_no_entries_is_refused(store: Path, kdstore_cli: Run, codec: str) -> None:
    path = store / "overlays" / "second" / "overlay.json"
    header = json.loads(path.read_text())
    identity = {**header["identity"], "codec": codec}
    content = {**header, "identity": identity, "config_digest": json_digest(identity)}
    path.write_text(json.dumps(content))
    for file in (*path.parent.glob("manifest-*"), *path.parent.glob("commits/*")):
        file.unlink()
    commits = [commit.to_bytes() for commit in kdstore.open(store, overlays=()).commits]
    for unit, data in enumerate(commits):
        text = json.dumps({**json.loads(data), "config_digest": json_digest(identity)})
        (path.parent / commit_path(unit)).write_text(text)
    with pytest.raises(HeaderError, match=f"unknown codec '{codec}'"):
        kdstore.open(store)[0, 1]
    assert codec in kdstore_cli("verify", "--quiet", store)[2]


def test_an_overlay_of_another_store_is_refused(dump: Dump, store: Path) -> None:
    other = dump("other", seed=3)
    shutil.copytree(store / "overlays", other / "overlays")
    with pytest.raises(HeaderError, match="another store"):
        kdstore.open(other)
    assert len(kdstore.open(other, overlays=())) == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": "9.0"}, "format version"),
        ({"reader_features": ["holograms"]}, "holograms"),
        ({"plan": {}}, "plan.units"),
        ({"identity": {}}, "identity.store"),
        ({"identity": {**IDENTITY, "draw": 1}}, "a draw or scalars"),
        ({"identity": {**IDENTITY, "scalars": [7]}}, "no names"),
        ({"identity": IDENTITY}, "digest"),
        ({"config_digest": "0"}, "digest"),
    ],
)
def test_a_header_that_is_none(store: Path, change: dict[str, object], message: str) -> None:
    header = store / "overlays" / "lse" / "overlay.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), **change}))
    with pytest.raises(HeaderError, match=message) as caught:
        kdstore.open(store)
    assert "overlays/lse/overlay.json" in str(caught.value)


def test_what_is_no_overlay_is_not_looked_at(store: Path) -> None:
    (store / "overlays" / ".DS_Store").write_bytes(b"")
    (store / "overlays" / "notes.txt").write_text("mine")
    (store / "overlays" / "empty").mkdir()
    assert set(kdstore.open(store).overlays.found) == {"second", "a-third", "lse"}


def test_stats_count_the_bytes_of_overlays(store: Path, kdstore_cli: Run) -> None:
    code, output, _ = kdstore_cli("stats", "--json", store)
    found = json.loads(output)
    added = sum(p.stat().st_size for p in (store / "overlays").rglob("part-*"))
    shards = added + sum(p.stat().st_size for p in (store / "data").iterdir())
    files = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    sizes, scored = found["bytes_per_position"], found["num_scored"]
    assert (code, found["bytes_total"], found["bytes_store"]) == (0, shards, files)
    assert sizes["overlays"] == pytest.approx(added / scored)
    assert sizes["total"] == pytest.approx(shards / scored)
    parts = ("signal", "scalars", "input_ids", "overlays", "other")
    assert sum(sizes[part] for part in parts) == pytest.approx(sizes["total"])


def test_gc_removes_orphans_of_overlays_and_nothing_else(store: Path, kdstore_cli: Run) -> None:
    before = {path for path in store.rglob("*") if path.is_file()}
    orphans = [
        store / "overlays" / name
        for name in (
            "lse/data/part-000001-0123abcd.parquet",
            "second/commits/.000001.json.0123abcd.partial",
            "second/.overlay.json.0123abcd.partial",
        )
    ]
    (store / "overlays" / "half").mkdir()
    orphans.append(store / "overlays" / "half" / ".overlay.json.0123abcd.partial")
    for path in orphans:
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 1e6, time.time() - 1e6))
    code, output, error = kdstore_cli("gc", "--json", store)
    assert code == 0, error
    found = {store / orphan["path"] for orphan in json.loads(output)["orphans"]}
    assert found == set(orphans)
    assert {path for path in store.rglob("*") if path.is_file()} == before
    assert kdstore_cli("verify", "--quiet", store)[0] == 0


def test_a_scalar_is_read_from_the_store_first_then_by_name(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What writers refuse, two that start at once can make."""
    monkeypatch.setattr("kdstore.writers.overlay._check_new", lambda *arguments: None)
    opened = kdstore.open(store)
    add_scalar(store, "entropy", lambda sample: np.zeros(sample.num_scored, np.float32))
    for name in ("b", "z"):
        writer = OverlayWriter.open(opened, name, scalars=["lse"], origin="caller")
        for unit in writer.pending_units():
            rows = range(*opened.first_rows[unit : unit + 2].tolist())
            samples = [with_lse(opened[row], ord(name)) for row in rows]
            writer.commit(unit, samples, statistics={}, provenance={})
    want, found = opened[0].signal, kdstore.open(store)[0].signal
    assert want is not None
    assert found is not None
    np.testing.assert_array_equal(found.scalars["entropy"], want.scalars["entropy"])
    assert set(found.scalars["lse"].tolist()) == {ord("b")}


def with_lse(sample: Sample, value: float) -> Sample:
    assert sample.signal is not None
    scalars = {"lse": np.full(sample.num_scored, value, np.float32)}
    return replace(sample, signal=replace(sample.signal, scalars=scalars))


def test_one_draw_under_two_names_is_read_from_the_first(store: Path) -> None:
    """Two writers that start at once can make that; both hold the same."""
    shutil.copytree(store / "overlays" / "second", store / "overlays" / "b-second")
    opened = Store(kdstore.open(store).folder)
    sample = opened[0, 1]
    opened = Store(opened.folder)
    del opened.overlays.found["second"]
    assert_same(opened[0, 1], sample)
    assert opened.num_draws == 3
