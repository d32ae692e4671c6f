"""Dumps into S3: resume, workers, kills, and reading in several processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

import kdstore
from kdstore.filesystem import Folder
from kdstore.layout import commit_path, manifest_path
from kdstore.sample import Sample
from tests.writers.test_dump import assert_same, assert_same_store

Dump = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
KILL_S = 120


@pytest.fixture
def url(bucket: str) -> str:
    return f"{bucket}/stores/one"


def test_a_dump_into_s3_is_the_local_one(dump: Dump, kdstore_cli: Run, url: str) -> None:
    local = dump()
    dump(out=url)
    assert_same_store(local, url)  # type: ignore[arg-type]
    for name in ("kdstore.json", "plan.parquet", "idorder.arrow", "tokenizer/table.arrow"):
        assert Folder(url).read(name) == (local / name).read_bytes()
    code, output, error = kdstore_cli("verify", "--quiet", "--json", url)
    assert (code, json.loads(output)["num_samples"]) == (0, 60), error
    for command in ("status", "stats", "inspect"):
        code, output, error = kdstore_cli(command, url)
        assert code == 0, error
        assert "60" in output


def test_a_rerun_changes_nothing(dump: Dump, url: str) -> None:
    dump(out=url)
    folder = Folder(url)
    before = {path: folder.names(path) for path in ("", "data", "commits", "tokenizer")}
    assert len(before["data"]) == len(before["commits"]) > 2
    dump(out=url)
    assert before == {path: folder.names(path) for path in before}


def test_lost_units_are_made_again(dump: Dump, kdstore_cli: Run, url: str) -> None:
    local = dump()
    dump(out=url)
    folder = Folder(url)
    num_units = kdstore.open(url).header.num_units
    folder.remove(manifest_path(num_units))
    for unit in (0, 2):
        folder.remove(commit_path(unit))
    assert len(kdstore.open(url)) < 60
    assert kdstore_cli("verify", "--quiet", url)[0] == 1
    dump(out=url)
    assert_same_store(local, url)  # type: ignore[arg-type]
    assert kdstore_cli("verify", "--quiet", url)[0] == 0


def test_workers_share_a_dump(dump: Dump, url: str) -> None:
    local = dump()
    dump(out=url, unit="1/2")
    assert not kdstore.open(url).is_complete
    dump(out=url, unit="0/2")
    assert kdstore.open(url).is_complete
    assert_same_store(local, url)  # type: ignore[arg-type]


def test_damage_fails_verify(dump: Dump, kdstore_cli: Run, url: str) -> None:
    dump(out=url)
    folder = Folder(url)
    path = kdstore.open(url).commits[1].shard.path
    data = bytearray(folder.read(path))
    data[len(data) // 3] ^= 1
    folder.replace(path, bytes(data))
    code, _, error = kdstore_cli("verify", "--quiet", url)
    assert (code, path in error) == (1, True), error


@pytest.mark.parametrize("server", ["rclone"])
def test_two_workers_of_which_one_is_killed(
    dump: Dump, kdstore_cli: Run, url: str, teacher_dir: Path, data_file: Path
) -> None:
    local = dump(unit_tokens=20)
    options = ["--teacher", teacher_dir, "--data", data_file, "--out", url, "--unit-tokens", 20]
    command = [sys.executable, "-m", "kdstore_cli.main", "dump", "--quiet", "--unit", "0/2"]
    killed = subprocess.Popen([*command, *map(str, options)])
    dump(out=url, unit_tokens=20, unit="1/2")
    folder = Folder(url)
    deadline = time.monotonic() + KILL_S
    while not folder.exists(commit_path(0)) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(timeout=KILL_S) == -signal.SIGKILL
    assert not kdstore.open(url).is_complete
    dump(out=url, unit_tokens=20)
    assert_same_store(local, url)  # type: ignore[arg-type]
    assert kdstore_cli("verify", "--quiet", url)[0] == 0


def test_an_overlay_in_s3_is_the_local_one(dump: Dump, kdstore_cli: Run, url: str) -> None:
    local = dump()
    dump(out=url)
    for out in (local, url):
        dump(out=out, overlay="lse", scalars="lse")
        for worker in ("1/2", "0/2"):
            assert kdstore.open(str(out)).num_draws == 1
            dump(out=out, overlay="draw1", draw=1, unit=worker)
    one, other = kdstore.open(local), kdstore.open(url)
    for index in range(60):
        assert_same(one[index, 1], other[index, 1])
    assert "lse" in one[0].signal.scalars  # type: ignore[union-attr]
    code, output, error = kdstore_cli("verify", "--quiet", "--json", url)
    assert (code, json.loads(output)["num_samples"]) == (0, 60), error


def samples_only(samples: list[Sample]) -> list[Sample]:
    return samples


@pytest.mark.filterwarnings("ignore:.*use of fork.*may lead to deadlocks:DeprecationWarning")
@pytest.mark.parametrize(
    ("server", "context", "num_workers"),
    [("moto", "fork", 2), ("rclone", "fork", 2), ("moto", "spawn", 1)],
)
def test_data_loader_workers_read_an_opened_store(
    dump: Dump, url: str, context: str, num_workers: int
) -> None:
    """Shards, row groups and connections that the parent has opened are no use to its children."""
    dump(out=url)
    store = kdstore.open(url)
    samples = list(store)
    loader = DataLoader(
        store,  # type: ignore[arg-type]
        batch_size=7,
        num_workers=num_workers,
        collate_fn=samples_only,
        multiprocessing_context=context,
        timeout=KILL_S,
    )
    read = [sample for batch in loader for sample in batch]
    for sample, other in zip(samples, read, strict=True):
        assert_same(sample, other)
    assert_same(store[-1], samples[-1])


def test_batches_come_from_s3(dump: Dump, url: str) -> None:
    local = dump()
    dump(out=url)
    options = {"batch_size": 8, "seed": 3}
    pairs = zip(
        kdstore.open(url).loader(**options), kdstore.open(local).loader(**options), strict=True
    )
    for remote, here in pairs:
        assert remote.sample_ids == here.sample_ids
        np.testing.assert_array_equal(remote.input_ids, here.input_ids)


def test_no_store_is_one_message(kdstore_cli: Run, url: str) -> None:
    code, _, error = kdstore_cli("verify", url)
    assert (code, "there is no store here" in error) == (1, True)
