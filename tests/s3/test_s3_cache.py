"""One local cache and several processes, some of which are killed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import kdstore
from tests.s3.conftest import Remote
from tests.s3.proxy import FaultProxy, serving
from tests.writers.test_dump import assert_same

WAIT_S = 120
READ = """
import json, sys
import kdstore
url, options = sys.argv[1], json.loads(sys.argv[2])
store = kdstore.open(url, **options)
print("opened", flush=True)
for _ in range(int(sys.argv[3])):
    for sample in store:
        print(sample.sample_id, hash(sample.signal.ids_N.tobytes()), flush=True)
"""
POLL_S = 0.002


@pytest.fixture(params=["moto"])
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def reader(remote: Remote, folder: Path, *, rounds: int, **options: Any) -> subprocess.Popen[str]:
    """A process that reads the whole store through the cache, and prints what it reads."""
    options = {"overlays": [], "cache_dir": str(folder), **remote.options(), **options}
    command = [sys.executable, "-c", READ, remote.url, json.dumps(options), str(rounds)]
    environment = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def check_whole(remote: Remote, folder: Path, rich_store: Path) -> None:
    """Another run reads everything right, and leaves nothing but whole shards."""
    store = kdstore.open(remote.url, cache_dir=folder, **remote.options())
    for one, other in zip(store, kdstore.open(rich_store), strict=True):
        assert_same(one, other)
    assert {path.suffix for path in folder.iterdir()} == {".parquet"}


def test_two_processes_fill_a_cache_of_two_shards(
    remote: Remote, rich_store: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "foreign.parquet").write_bytes(b"mine")
    local = kdstore.open(rich_store)
    largest = max(commit.shard.bytes for commit in local.commits)
    limit = 2 * largest
    children = [reader(remote, folder, rounds=3, cache_bytes=limit) for _ in range(2)]
    outputs: list[str] = [""] * 2

    def collect(n: int) -> None:
        outputs[n] = children[n].communicate(timeout=WAIT_S)[0]

    threads = [threading.Thread(target=collect, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, bytes_in(folder))
        threads[0].join(POLL_S)
    assert [child.returncode for child in children] == [0, 0]
    assert outputs[0] == outputs[1]
    names = [line.split()[0] for line in outputs[0].splitlines()[1:]]
    assert names == [f"row-{n}" for n in range(60)] * 3
    assert limit / 2 < most <= limit + largest + 4
    assert bytes_in(folder) <= limit + 4
    assert (folder / "foreign.parquet").read_bytes() == b"mine"


class HalfShards(FaultProxy):
    """Sends the first half of the third shard's first range, then waits; ``waiting`` says so."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream, seed=0)
        self.waiting, self._shards = threading.Event(), set[str]()

    def fault(self, request: tuple[str, ...]) -> str | None:
        method, path, span = request
        if method == "GET" and "/data/" in path and span.startswith("bytes=0-"):
            self._shards.add(path)
            if len(self._shards) == 3:
                self.waiting.set()
                self.stopping.wait(WAIT_S)
                return "cut"
        return None


def test_a_kill_in_the_middle_of_a_download(
    remote: Remote, rich_store: Path, tmp_path: Path
) -> None:
    """The partial file stays, without its lock, and the next run makes a whole one of it."""
    folder = tmp_path / "cache"
    with serving(HalfShards(remote.address)) as proxy:
        child = reader(remote, folder, rounds=1, endpoint_url=proxy.address)
        assert proxy.waiting.wait(WAIT_S)
        (partial,) = folder.glob("*.partial")
        with partial.open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=WAIT_S)
    assert child.returncode == -signal.SIGKILL
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(list(folder.glob("*.parquet"))) == 2
    check_whole(remote, folder, rich_store)


LOADER = """
import json, sys
import kdstore
from torch.utils.data import DataLoader
store = kdstore.open(sys.argv[1], **json.loads(sys.argv[2]))
store.prefetch(range(len(store)))
while True:
    for batch in DataLoader(store, batch_size=4, num_workers=2, collate_fn=list):
        print(len(batch), flush=True)
"""


def test_a_killed_job_leaves_nothing_to_trip_over(
    remote: Remote, rich_store: Path, tmp_path: Path
) -> None:
    """Workers and all, as a scheduler does it: no shared memory, no lock, no file believed."""
    folder = tmp_path / "cache"
    options = {"cache_dir": str(folder), "cache_bytes": 250_000, **remote.options()}
    command = [sys.executable, "-c", LOADER, remote.url, json.dumps(options)]
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert job.stdout is not None
    assert job.stdout.readline() == b"4\n"
    os.killpg(job.pid, signal.SIGKILL)
    assert job.wait(WAIT_S) == -signal.SIGKILL
    job.stdout.read()  # ends with the last worker
    job.stdout.close()
    shared = [path.name for path in Path("/dev/shm").glob("*")]  # other tests' too
    assert str(job.pid) not in re.findall(r"\d+", " ".join(shared))
    assert not [name for name in shared if "kdstore" in name]
    check_whole(remote, folder, rich_store)
