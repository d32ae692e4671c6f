"""A folder on a local disk and in memory: whole files or none, and errors that say where."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from kdstore import localfile
from kdstore.errors import StorageError, StoreNotFoundError
from kdstore.filesystem import Folder


@pytest.fixture(params=["path", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    """A folder that does not exist yet, named by a path, a file:// and a memory:// URL."""
    if request.param != "memory":
        prefix = "file://" if request.param == "file" else ""
        yield Folder(f"{prefix}{tmp_path}/some/store/")
        return
    yield Folder("memory://some/store/")
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


@pytest.fixture
def local(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def break_off(target: Path, error: Exception) -> None:
    target.write_bytes(b"half")
    raise error


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_a_missing_folder_is_empty(folder: Folder) -> None:
    assert folder.names() == folder.names("commits") == []
    assert not folder.exists()
    assert not folder.exists("file")
    for read in (folder.read, folder.size, folder.open_file):
        with pytest.raises(FileNotFoundError):
            read("file")
    folder.remove("file")


def test_files_are_read_back(folder: Folder) -> None:
    folder.replace("a/one", b"first")
    folder.replace("a/one", b"0123456789")
    folder.replace("a/none", b"")
    assert (folder.read("a/one"), folder.size("a/one")) == (b"0123456789", 10)
    assert (folder.read("a/none"), folder.size("a/none")) == (b"", 0)
    assert folder.read_many(["a/one", "a/none"]) == [b"0123456789", b""]
    assert folder.read_range("a/one", 3, 5) == b"34"
    assert folder.read_range("a/one", 8, 99) == b"89"
    assert folder.read_range("a/one", 4, 4) == b""
    assert (folder.names(), folder.names("a")) == (["a"], ["none", "one"])
    assert folder.exists("a/one")
    folder.remove("a/one")
    assert folder.names("a") == ["none"]


def test_an_open_file_can_be_searched(folder: Folder) -> None:
    folder.replace("file", b"0123456789")
    with folder.open_file("file") as file:
        assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
        assert (file.seek(2), file.read(3), file.tell()) == (2, b"234", 5)
        assert (file.seek(1, os.SEEK_CUR), file.read(1)) == (6, b"6")
        assert (file.seek(-2, os.SEEK_END), file.read(), file.read(1)) == (8, b"89", b"")
        assert (file.seek(99), file.read(1), file.read()) == (99, b"", b"")


def test_a_second_create_changes_nothing(folder: Folder) -> None:
    assert folder.create("commits/0", b"one")
    assert not folder.create("commits/0", b"two")
    assert not folder.create("commits/0", b"one")
    assert folder.read("commits/0") == b"one"
    assert folder.names("commits") == ["0"]


def test_one_of_many_creators_wins(local: Folder) -> None:
    start, won = threading.Barrier(8), []

    def create(number: int) -> None:
        start.wait(timeout=60)
        if local.create("file", b"%d" % number):
            won.append(b"%d" % number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [local.read("file")]
    assert local.names() == ["file"]


def test_a_written_file_appears_when_the_block_ends(folder: Folder) -> None:
    data = os.urandom(3 << 20)
    with folder.writing("data/file") as target:
        target.write_bytes(data)
        assert not folder.exists("data/file")
    assert folder.read("data/file") == data
    assert folder.names("data") == ["file"]
    with folder.writing("data/file") as target:
        target.write_bytes(b"again")
    assert folder.read("data/file") == b"again"


def test_an_exception_leaves_nothing(folder: Folder) -> None:
    with pytest.raises(ZeroDivisionError), folder.writing("data/file") as target:
        break_off(target, ZeroDivisionError())
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageError, match="No space left") as info, folder.writing("file") as path:
        break_off(path, full)
    assert folder.location("file") in str(info.value)
    assert folder.names("data") == []
    assert not folder.exists("file")


def test_our_own_errors_pass_through(folder: Folder) -> None:
    with pytest.raises(StoreNotFoundError), folder.writing("file"):
        raise StoreNotFoundError("another store is missing")


def refuse(number: int) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("name", ["fsync", "link"])
def test_a_full_disk_leaves_no_partial(
    local: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    local.create("kept", b"old")
    monkeypatch.setattr(os, name, refuse(errno.ENOSPC))
    monkeypatch.setattr(Path, "replace", refuse(errno.ENOSPC))
    for write in (
        lambda: local.create("new", b"x"),
        lambda: local.replace("kept", b"x"),
    ):
        with pytest.raises(StorageError, match="No space left"):
            write()
    with pytest.raises(StorageError, match="No space left"), local.writing("file") as target:
        target.write_bytes(b"x")
    assert leftovers(tmp_path) == ["kept"]
    assert local.read("kept") == b"old"


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_create_without_hard_links(
    local: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", refuse(number))
    assert local.create("file", b"one")
    assert not local.create("file", b"two")
    assert local.read("file") == b"one"
    assert leftovers(tmp_path) == ["file"]


def test_a_link_whose_answer_was_lost_is_ours(
    local: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert local.create("file", b"one")
    assert not local.create("file", b"one")


def test_files_and_their_folders_are_synced(
    local: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(localfile, "_sync", lambda path: synced.append(path.name))
    local.replace("one/two/file", b"x")
    assert [synced[0], synced[1], synced[3]] == [tmp_path.name, "one", "two"]
    assert synced[2].endswith(".partial")


def test_mounts_that_cannot_sync_folders_work(
    local: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = localfile._sync

    def files_only(path: Path) -> None:
        if path.is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(path)

    monkeypatch.setattr(localfile, "_sync", files_only)
    assert local.create("a/file", b"x")
    local.replace("a/file", b"y")
    assert local.read("a/file") == b"y"


def test_a_file_in_the_way_is_an_error(local: Folder) -> None:
    local.replace("data", b"a file")
    for write in (local.create, local.replace):
        with pytest.raises(StorageError, match="data/part"):
            write("data/part", b"x")
    assert local.read("data") == b"a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(local: Folder, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            local.create("file", b"x")
        with pytest.raises(StorageError, match="Permission denied"), local.writing("file"):
            pass
    finally:
        tmp_path.chmod(0o700)
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_without_permission(local: Folder, tmp_path: Path) -> None:
    local.replace("file", b"x")
    (tmp_path / "file").chmod(0)
    with pytest.raises(StorageError, match="Permission denied"):
        local.read("file")


def test_local_roots(tmp_path: Path) -> None:
    for url in (
        tmp_path,
        str(tmp_path),
        f"{tmp_path}//",
        f"file://{tmp_path}",
        f"local://{tmp_path}",
    ):
        assert Folder(url).local_root == tmp_path
    assert Folder("memory://store").local_root is None


def test_urls_lose_only_their_trailing_slashes() -> None:
    expected = {"/": "/", "a/": "a", "memory://": "memory://", "s3://b/x//": "s3://b/x"}
    assert {url: Folder(url).url for url in expected} == expected
    assert Folder("/").location("file") == "/file"
    assert "etc" in Folder("/").names()


def test_pickled_folders_keep_their_options(folder: Folder) -> None:
    folder.replace("file", b"x")
    again = pickle.loads(pickle.dumps(folder))
    assert (again.url, again.read("file")) == (folder.url, b"x")
    assert pickle.loads(pickle.dumps(Folder("s3://b", anon=True))).storage_options == {"anon": True}


def test_options_and_secrets_are_not_shown() -> None:
    assert repr(Folder("s3://bucket/store/", secret="s")) == "Folder('s3://bucket/store')"


@pytest.mark.filterwarnings("ignore:.*use of fork.*may lead to deadlocks:DeprecationWarning")
def test_a_forked_child_does_not_move_its_parents_file(local: Folder) -> None:
    local.replace("file", b"0123456789")
    file = local.open_file("file")
    file.seek(5)
    process = os.fork()
    if process == 0:
        os._exit(0 if file.read(2) == b"56" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert file.read(2) == b"56"
