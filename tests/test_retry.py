"""Reads that are tried again: which failures, how often, and what counts as an answer."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from kdstore import retry
from kdstore.errors import StorageError
from kdstore.filesystem import Folder
from kdstore.retry import ATTEMPTS, may_pass

LASTING = [
    FileNotFoundError("x"),
    IsADirectoryError("x"),
    PermissionError(errno.EACCES, "forbidden"),
    OSError(errno.EINVAL, "InvalidRange"),
    NoCredentialsError(),
    ValueError("x"),
    KeyboardInterrupt(),
]
PASSING = [
    ConnectionResetError("x"),
    TimeoutError("x"),
    OSError("without a number"),
    OSError(errno.EBUSY, "SlowDown"),
    OSError(errno.EIO, "x"),
    EndpointConnectionError(endpoint_url="x"),
]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0)
    folder = Folder("memory://retried")
    folder.replace("file", b"0123456789")
    yield folder
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def broken(
    monkeypatch: pytest.MonkeyPatch, kind: type, name: str, answers: list[Any]
) -> Callable[[], int]:
    """A method gives these answers first, raising those that are errors; how many are left."""
    method = getattr(kind, name)

    def fail(*arguments: Any, **options: Any) -> Any:
        if answers:
            answer = answers.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            return answer
        return method(*arguments, **options)

    monkeypatch.setattr(kind, name, fail)
    return lambda: len(answers)


def test_what_is_tried_again() -> None:
    assert [may_pass(error) for error in LASTING] == [False] * len(LASTING)
    assert [may_pass(error) for error in PASSING] == [True] * len(PASSING)


@pytest.mark.parametrize(
    ("name", "ask", "answer"),
    [
        ("cat_file", lambda folder: folder.read("file"), b"0123456789"),
        ("cat_file", lambda folder: folder.read("file", max_bytes=3), b"0123"),
        ("cat_file", lambda folder: folder.read_range("file", 2, 5), b"234"),
        ("cat_file", lambda folder: folder.read_ranges("file", [(2, 5), (0, 1)]), [b"234", b"0"]),
        ("size", lambda folder: folder.size("file"), 10),
        ("exists", lambda folder: folder.exists("file"), True),
        ("ls", lambda folder: folder.names(), ["file"]),
    ],
)
def test_every_read_is_tried_again(
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    ask: Callable[[Folder], Any],
    answer: Any,
) -> None:
    left = broken(monkeypatch, MemoryFileSystem, name, [ConnectionResetError("x")] * 3)
    assert ask(folder) == answer
    assert left() == 0


def test_the_last_failure_is_told(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Any] = [ConnectionResetError(f"number {n}") for n in range(1, 9)]
    left = broken(monkeypatch, MemoryFileSystem, "cat_file", errors)
    with pytest.raises(StorageError, match=f"number {ATTEMPTS}"):
        folder.read("file")
    assert left() == 8 - ATTEMPTS


@pytest.mark.parametrize("error", LASTING[:-1], ids=repr)
def test_lasting_failures_are_told_at_once(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    left = broken(monkeypatch, MemoryFileSystem, "cat_file", [error, error])
    with pytest.raises((StorageError, FileNotFoundError, IsADirectoryError)):
        folder.read("file")
    assert left() == 1


def test_local_reads_are_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    folder.replace("file", b"0123456789")
    errors: list[Any] = [OSError(errno.EIO, "Input/output error")] * 2
    left = broken(monkeypatch, LocalFileSystem, "cat_file", errors)
    with pytest.raises(StorageError, match="Input/output error"):
        folder.read_ranges("file", [(0, 3)])
    assert left() == 1


@pytest.mark.parametrize("wrong", [b"", b"23", b"2345"])
def test_an_answer_of_another_length_is_no_data(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, wrong: bytes
) -> None:
    asked: list[tuple[int, int]] = []
    cat_file = MemoryFileSystem.cat_file

    def cat(self: Any, path: str, start: int, end: int) -> Any:
        asked.append((start, end))
        return wrong if asked.count((2, 5)) < 3 and start == 2 else cat_file(self, path, start, end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat)
    ranges = [(0, 2), (2, 5), (7, 7), (5, 10), (0, 2)]
    assert folder.read_ranges("file", ranges) == [b"01", b"234", b"", b"56789", b"01"]
    assert asked == [(0, 2), (2, 5), (5, 10), (2, 5), (2, 5)]
    with pytest.raises(StorageError, match="10 bytes of the range"):
        folder.read_ranges("file", [(0, 11)])


def test_missing_files_have_no_ranges(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.read_ranges("nothing", [(0, 1)])
