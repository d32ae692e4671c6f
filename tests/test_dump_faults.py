"""Dumps that are stopped, run out of room or meet another: run again, they give the same store."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kdstore
from tests.test_kill import commits_in, dump_arguments
from tests.writers.test_dump import assert_same_store

Run = Callable[..., tuple[int, str, str]]
WAIT_S = 240
SHARD_BYTES = 8_000  # less than a shard has, more than any other file of a unit


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kdstore_cli.main", "dump", *dump_arguments(out, *options)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, error = process.communicate(timeout=WAIT_S)
    return process.returncode, error


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_tidy(out: Path) -> None:
    """No file is half-written, and no shard without its commit."""
    assert list(out.rglob("*.partial")) == []
    assert len(list((out / "data").glob("*"))) == commits_in(out)


def assert_resumes_to(whole: Path, out: Path, kdstore_cli: Run) -> None:
    code, error = ended(start(out))
    assert code == 0, error
    assert_same_store(whole, out)
    assert_tidy(out)
    assert not (out / "running").exists()
    assert kdstore_cli("verify", "--quiet", out)[0] == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "store"
    code, error = ended(start(out))
    assert code == 0, error
    return out


def test_sigterm_finishes_the_units_in_work(tmp_path: Path, whole: Path, kdstore_cli: Run) -> None:
    out = tmp_path / "store"
    process = start(out)
    wait_until(lambda: commits_in(out) >= 2)
    process.send_signal(signal.SIGTERM)
    code, error = ended(process)
    assert code == 1
    assert "kdstore: SIGTERM: the units in work are finished" in error
    assert "run the same command again to go on" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert 2 < commits_in(out) < kdstore.open(whole).header.num_units
    assert list((out / "running").glob("*")) == []
    assert_tidy(out)
    assert_resumes_to(whole, out, kdstore_cli)


def test_a_second_sigterm_stops_at_once(tmp_path: Path) -> None:
    out = tmp_path / "store"
    process = start(out, "--unit-tokens", "1000000")
    wait_until(lambda: (out / "running" / "000000.json").exists())
    assert process.stderr is not None
    process.send_signal(signal.SIGTERM)
    for line in process.stderr:
        if "once more stops at once" in line:
            break
    process.send_signal(signal.SIGTERM)
    code, error = ended(process)
    assert code == 1
    assert "interrupted; run the same command again" in error
    assert "Traceback" not in error
    assert commits_in(out) == 0
    assert list((out / "running").glob("*")) == []


def test_a_disk_that_is_full_in_mid_shard(tmp_path: Path, whole: Path, kdstore_cli: Run) -> None:
    out = tmp_path / "store"
    process = start(out)
    wait_until(lambda: commits_in(out) >= 2)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SHARD_BYTES, SHARD_BYTES))
    code, error = ended(process)
    assert code == 1
    assert "the file system refused a write; nothing of this file is visible" in error
    assert "Traceback" not in error
    assert_tidy(out)
    found = json.loads(kdstore_cli("status", "--json", out)[1])
    assert (found["units_failed"], found["units_running"]) == (1, 0)
    assert found["records"][0]["error"].startswith("StorageError: the file system refused")
    assert_resumes_to(whole, out, kdstore_cli)


def test_two_dumps_race_for_one_store(tmp_path: Path, whole: Path, kdstore_cli: Run) -> None:
    """From the plan on, and for every unit."""
    out = tmp_path / "store"
    for code, error in [ended(process) for process in [start(out), start(out)]]:
        assert code == 0, error
    assert_same_store(whole, out)
    ids = [sample.sample_id for sample in kdstore.open(out)]
    assert len(set(ids)) == len(ids)
    assert_tidy(out)
    assert kdstore_cli("verify", "--quiet", out)[0] == 0
