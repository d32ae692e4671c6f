"""Dumps into S3 whose uploads fail: run again until done, they give the local store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import s3fs

import kdstore
from kdstore import retry
from kdstore.errors import StorageError
from kdstore.filesystem import Folder
from tests.s3.conftest import Remote
from tests.s3.proxy import FaultProxy, serving
from tests.writers.pipelines import Work
from tests.writers.test_dump import assert_same_store

Run = Callable[..., tuple[int, str, str]]
RUNS = 60


def test_one_request_in_four_fails(
    bucket: str,
    server: str,
    request: pytest.FixtureRequest,
    kdstore_cli: Run,
    teacher_dir: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also answers that are lost after the server did what was asked; nobody tries writes again."""
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    url = f"{bucket}/store"
    remote = Remote(url, request.getfixturevalue(f"{server}_address"))
    failures, committed = 0, 0
    with serving(FaultProxy(remote.address, seed=2)) as proxy:
        config = {"retries": {"max_attempts": 0}, "read_timeout": 5}
        options = {**remote.options(proxy.address), "config_kwargs": config}
        for _ in range(RUNS):
            try:
                work = Work.at(Folder(url, **options), teacher_dir, data_file)
                work.run()
                work.writer.seal()
                break
            except StorageError:
                failures += 1
            if Folder(url).exists("kdstore.json"):  # a reader sees whole units, and no fewer
                store = kdstore.open(url)
                assert len(list(store)) == len(store)
                assert len(store.commits) >= committed
                committed = len(store.commits)
    assert failures >= 3
    assert proxy.faults["503"] > 0
    whole = Work.at(Folder(tmp_path / "whole"), teacher_dir, data_file)
    whole.run()
    assert_same_store(tmp_path / "whole", url)  # type: ignore[arg-type]
    assert kdstore_cli("verify", "--quiet", url)[0] == 0
