"""The operations of a folder on two S3 servers."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import s3fs
import xxhash

from kdstore import retry
from kdstore.errors import StorageError
from kdstore.filesystem import Folder
from tests.test_filesystem import break_off


@pytest.fixture
def folder(bucket: str) -> Folder:
    return Folder(f"{bucket}/some/store/")


@pytest.fixture
def other(bucket: str) -> s3fs.S3FileSystem:
    """Another client, as another process is: it shares no cache with a folder's."""
    return s3fs.S3FileSystem(skip_instance_cache=True)


def key(folder: Folder, path: str) -> str:
    return folder.location(path).removeprefix("s3://")


def record_requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    calls: list[tuple[str, dict[str, Any]]] = []
    send = s3fs.S3FileSystem._call_s3

    async def record(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        calls.append((method, options))
        return await send(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", record)
    return calls


def test_a_missing_folder_is_empty(folder: Folder) -> None:
    assert folder.names() == folder.names("commits") == []
    assert not folder.exists()
    assert not folder.exists("kdstore.json")
    for read in (folder.read, folder.size, folder.open_file):
        with pytest.raises(FileNotFoundError):
            read("kdstore.json")
    folder.remove("kdstore.json")


def test_files_are_read_back(folder: Folder) -> None:
    folder.replace("a/one", b"first")
    folder.replace("a/one", b"0123456789")
    folder.replace("a/none", b"")
    assert (folder.read("a/one"), folder.size("a/one")) == (b"0123456789", 10)
    assert (folder.read("a/none"), folder.size("a/none")) == (b"", 0)
    assert folder.read_range("a/one", 3, 5) == b"34"
    assert folder.read_range("a/one", 8, 99) == b"89"
    assert folder.read_range("a/one", 4, 4) == b""
    assert folder.read_many(["a/one", "a/none"]) == [b"0123456789", b""]
    assert (folder.names(), folder.names("a")) == (["a"], ["none", "one"])
    with folder.open_file("a/one") as file:
        file.seek(-4, os.SEEK_END)
        assert (file.read(2), file.tell(), file.read(), file.read(1)) == (b"67", 8, b"89", b"")
    folder.remove("a/one")
    assert folder.names("a") == ["none"]


@pytest.mark.parametrize("server", ["moto"])  # rclone makes a file of it
def test_an_empty_object_that_stands_for_the_folder_has_no_name(
    folder: Folder, other: s3fs.S3FileSystem
) -> None:
    other.call_s3("put_object", Bucket=folder.url.split("/")[2], Key="some/store/", Body=b"")
    assert folder.names() == []
    folder.replace("file", b"x")
    assert folder.names() == ["file"]


def test_a_second_create_changes_nothing(folder: Folder) -> None:
    assert folder.create("commits/000000.json", b"one")
    assert not folder.create("commits/000000.json", b"two")
    assert not folder.create("commits/000000.json", b"one")
    assert folder.read("commits/000000.json") == b"one"
    assert folder.names("commits") == ["000000.json"]


def test_create_is_one_conditional_put(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_requests(monkeypatch)
    folder.create("file", b"one")
    puts = [options for method, options in calls if "put" in method or "upload" in method]
    assert [put["IfNoneMatch"] for put in puts] == ["*"]


def test_a_race_to_create_leaves_one_whole_file(
    folder: Folder, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find the name free; where the server does not arbitrate, the later one overwrites."""
    folder.create("file", b"one")
    exists = iter([False, True])
    monkeypatch.setattr(folder, "exists", lambda path: next(exists))
    created = folder.create("file", b"two")
    honoured = server == "moto"
    assert created is not honoured
    assert folder.read("file") == (b"one" if honoured else b"two")
    assert folder.names() == ["file"]


def test_many_creators_leave_one_whole_file(folder: Folder, server: str) -> None:
    contents = [secrets.token_bytes(100_000) for _ in range(8)]
    with ThreadPoolExecutor(len(contents)) as pool:
        created = list(pool.map(lambda data: folder.create("file", data), contents))
    winners = [data for data, won in zip(contents, created, strict=True) if won]
    assert folder.read("file") in winners
    assert len(winners) == 1 or server == "rclone"


@pytest.mark.parametrize("server", ["moto"])
def test_a_repeated_request_is_not_taken_for_a_rival(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to a PUT is lost, the client sends it again and finds the name taken, by itself.

    Taken for a rival's, the shard that the commit names would be removed.
    """
    send = s3fs.S3FileSystem._call_s3

    async def twice(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "put_object":
            await send(self, method, *arguments, **options)
        return await send(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", twice)
    assert folder.create("file", b"one")
    assert folder.read("file") == b"one"


@pytest.mark.parametrize("server", ["moto"])
@pytest.mark.parametrize("code", ["PreconditionFailed", "ConditionalRequestConflict"])
def test_servers_refuse_a_taken_name_in_several_ways(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """A 412 without a named condition, and AWS's 409 while another request is under way."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    send = s3fs.S3FileSystem._call_s3

    async def refuse(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "put_object" and "IfNoneMatch" in options:
            await send(self, method, *arguments, **{**options, "Body": b"the rival's"})
            raise translate_boto_error(ClientError({"Error": {"Code": code}}, "PutObject"))
        return await send(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", refuse)
    assert not folder.create("file", b"ours")
    assert folder.read("file") == b"the rival's"


@pytest.mark.parametrize("part_bytes", [None, 5 << 20], ids=["one PUT", "multipart"])
def test_large_files_arrive_whole(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, part_bytes: int | None
) -> None:
    if part_bytes:
        monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize: part_bytes)
    calls = record_requests(monkeypatch)
    data = secrets.token_bytes((12 << 20) + 7)
    with folder.writing("data/large") as target:
        target.write_bytes(data)
        assert folder.names("data") == []
    assert sum(method == "upload_part" for method, _ in calls) == (3 if part_bytes else 0)
    assert folder.size("data/large") == len(data)
    digest = xxhash.xxh3_128_hexdigest(data)
    assert xxhash.xxh3_128_hexdigest(folder.read("data/large")) == digest
    with folder.open_file("data/large") as file:
        assert xxhash.xxh3_128_hexdigest(file.readall()) == digest


def test_an_exception_leaves_nothing(folder: Folder) -> None:
    with pytest.raises(ZeroDivisionError), folder.writing("data/file") as target:
        break_off(target, ZeroDivisionError())
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageError, match="No space"), folder.writing("data/file") as target:
        break_off(target, full)
    assert folder.names() == []
    assert not folder.exists("data/file")


def test_a_broken_multipart_upload_leaves_nothing(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize: 5 << 20)
    send = s3fs.S3FileSystem._call_s3

    async def break_second(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if options.get("PartNumber") == 2:
            raise ConnectionResetError("the line broke")
        return await send(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", break_second)
    with pytest.raises(StorageError, match="the line broke"), folder.writing("large") as target:
        target.write_bytes(bytes(12 << 20))
    assert folder.names() == []
    uploads = folder._fs.call_s3("list_multipart_uploads", Bucket=folder.url.split("/")[2])
    assert not uploads.get("Uploads")


def test_what_others_write_is_seen(folder: Folder, other: s3fs.S3FileSystem) -> None:
    folder.create("commits/000000.json", b"one")
    assert folder.names("commits") == ["000000.json"]
    assert folder.names() == ["commits"]
    assert not folder.exists("commits/000001.json")
    other.pipe_file(key(folder, "commits/000001.json"), b"two")
    other.pipe_file(key(folder, "kdstore.json"), b"{}")
    assert folder.exists("commits/000001.json")
    assert folder.exists("kdstore.json")
    assert folder.names("commits") == ["000000.json", "000001.json"]
    other.pipe_file(key(folder, "commits/000001.json"), b"longer")
    assert folder.size("commits/000001.json") == 6
    other.rm_file(key(folder, "kdstore.json"))
    assert not folder.exists("kdstore.json")


def read_in_child(folder: Folder, queue: Any) -> None:
    queue.put((folder.read("file"), folder.names(), folder.create("child", b"x")))


@pytest.mark.filterwarnings("ignore:.*use of fork.*may lead to deadlocks:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_use_an_opened_folder(folder: Folder, method: str) -> None:
    folder.replace("file", b"shared")
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=read_in_child, args=(folder, queue)) for _ in range(2)]
    for child in children:
        child.start()
    answers = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert [answer[:1] for answer in answers] == [(b"shared",)] * 2
    assert folder.read("file") == b"shared"
    assert folder.names() == ["child", "file"]


def test_a_forked_child_may_go_on_reading_an_opened_file(folder: Folder) -> None:
    folder.replace("file", b"0123456789")
    file = folder.open_file("file")
    file.seek(5)
    process = os.fork()
    if process == 0:
        try:
            os._exit(0 if file.read(2) == b"56" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert file.read(2) == b"56"


def test_pickled_folders_open_anew(folder: Folder) -> None:
    folder.replace("file", b"x")
    again = pickle.loads(pickle.dumps(folder))
    assert (again.url, again.read("file")) == (folder.url, b"x")


@pytest.mark.parametrize("server", ["moto"])
def test_refusals_say_where(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Folder("s3://kdstore-no-such-bucket/store")
    assert missing.names() == []
    assert not missing.exists("kdstore.json")
    with pytest.raises(StorageError, match="s3://kdstore-no-such-bucket/store/file"):
        missing.create("file", b"x")
    with (
        pytest.raises(StorageError, match="no-such-bucket/store/large"),
        missing.writing("large") as target,
    ):
        target.write_bytes(b"x")
    assert not missing.exists()


@pytest.mark.parametrize("server", ["moto"])
def test_a_dead_address_is_an_error_not_an_empty_folder(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    dead = Folder(
        f"{bucket}/store",
        endpoint_url="http://127.0.0.1:9",
        config_kwargs={"retries": {"max_attempts": 0}},
    )
    for ask in (dead.names, dead.exists, lambda: dead.read("kdstore.json")):
        with pytest.raises(StorageError, match="cannot read"):
            ask()
    with pytest.raises(StorageError, match="Could not connect"):
        dead.create("file", b"x")
