"""One folder on any file system, with the few atomic operations that a store is built from.

Nothing half-written is ever visible: files appear whole, by rename or link on a local disk and by
one finished upload elsewhere. fsspec's write context managers are not used, since they publish what
was written so far when an exception leaves them.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from kdstore.errors import KDStoreError, StorageError
from kdstore.localfile import partial_beside, publish, publish_new
from kdstore.retry import retrying

READS_AT_ONCE = 16
_REFUSED = "the file system refused a write; nothing of this file is visible"
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# rclone's server sends the whole object's checksum with a range of it; a store has its own hashes.
_S3_CONFIG = {"response_checksum_validation": "when_required"}
T = TypeVar("T")


class Folder:
    """A folder named by a path or an fsspec URL; opened lazily, so that it can be pickled.

    Reading raises FileNotFoundError for what is not there. Every other failure, of reading or
    writing, is a StorageError; reads of a remote file system are tried again before (``retry``).
    What other processes wrote is seen: no listing is remembered.
    """

    def __init__(self, url: str | os.PathLike[str], **storage_options: Any) -> None:
        self.url = re.sub(r"(?<![:/])/+$", "", str(url)) or "/"
        self.storage_options = storage_options
        self._opened_in: dict[int, tuple[Any, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "storage_options": self.storage_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _opened_in={})

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    @property
    def local_root(self) -> Path | None:
        """The folder's path if it lies on a local disk, else None."""
        fs, root = self._opened
        return Path(root or "/") if "file" in _protocols(fs) else None

    def within(self, path: str) -> Folder:
        """A folder in this one."""
        return Folder(self.location(path), **self.storage_options)

    def location(self, path: str) -> str:
        """The full name of a file, for messages."""
        return f"{self.url.rstrip('/')}/{path}"

    def read(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """All bytes of a file, ``max_bytes`` + 1 of a larger one; FileNotFoundError if none."""

        def ask() -> bytes:
            fs, name = self._fresh_fs, self._at(path)
            local = "file" in _protocols(fs)  # there a size is cheap, and a range takes its memory
            if max_bytes is None or (local and fs.size(name) <= max_bytes):
                return bytes(fs.cat_file(name))
            return bytes(fs.cat_file(name, start=0, end=max_bytes + 1))

        return self._reading(path, ask)

    def read_many(self, paths: Sequence[str], *, max_bytes: int | None = None) -> list[bytes]:
        """All bytes of several files, some at once: a remote read is mostly waiting."""
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            return list(pool.map(lambda path: self.read(path, max_bytes=max_bytes), paths))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """The bytes ``[start, end)`` of a file, as far as it has them."""
        if end <= start:  # no range header can say so
            return b""
        return self._reading(
            path, lambda: bytes(self._fs.cat_file(self._at(path), start=start, end=end))
        )

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes ``[start, end)`` of each range, all of which the file has; remote ones at once.

        A shorter or longer answer is a failure, never data.
        """
        found = {span: b"" for span in ranges if span[0] >= span[1]}

        def ask_for_the_rest() -> list[bytes]:
            rest = [span for span in dict.fromkeys(ranges) if span not in found]
            paths = [self._at(path)] * len(rest)
            starts, ends = [start for start, _ in rest], [end for _, end in rest]
            answers = self._fs.cat_ranges(paths, starts, ends, on_error="return")
            failure: Exception | None = None
            for span, answer in zip(rest, answers, strict=True):
                if isinstance(answer, Exception):
                    failure = answer
                elif len(answer) != span[1] - span[0]:
                    failure = OSError(f"{len(answer)} bytes of the range {span}")
                else:
                    found[span] = bytes(answer)
            if failure is not None:
                raise failure
            return [found[span] for span in ranges]

        return self._reading(path, ask_for_the_rest)

    def size(self, path: str) -> int:
        """Size of a file in bytes; FileNotFoundError if there is none."""
        return self._reading(path, lambda: int(self._fresh_fs.size(self._at(path))))

    def exists(self, path: str = "") -> bool:
        """Whether a file or folder is there."""
        return self._reading(path, lambda: bool(self._fresh_fs.exists(self._at(path))))

    def names(self, path: str = "") -> list[str]:
        """Sorted names of the files and folders in a folder; empty if there is none."""
        folder = self._at(path)
        try:
            entries = self._reading(path, lambda: self._fresh_fs.ls(folder, detail=False))
        except FileNotFoundError:
            return []
        marker = f"{folder}/"  # an empty object by which some S3 tools make a folder
        return sorted(str(e).rstrip("/").rsplit("/", 1)[-1] for e in entries if e != marker)

    def modified_s(self, path: str) -> float:
        """When a file was last written, in seconds since 1970."""
        return self._reading(
            path, lambda: float(self._fresh_fs.modified(self._at(path)).timestamp())
        )

    def open_file(self, path: str) -> io.RawIOBase:
        """A seekable binary file for reading, without a buffer; FileNotFoundError if none."""
        return _RangeFile(self, path)

    def remove(self, path: str) -> None:
        """Remove a file; a missing one is fine."""
        with self._writing(path, "cannot remove"), suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def remove_folder(self, path: str) -> None:
        """Remove a folder of a local disk if it is empty; elsewhere an empty one does not exist."""
        root = self.local_root
        if root is not None:
            with suppress(OSError):
                (root / path).rmdir()

    def create(self, path: str, data: bytes) -> bool:
        """Write a new file whole. False, and nothing changed, if there is one already.

        An object store that does not honour conditional writes overwrites instead, if two
        processes create the file at once.
        """
        with self._writing(path):
            root = self.local_root
            if root is None:
                return self._create_remote(path, data)
            target = root / path
            with partial_beside(target) as partial:
                partial.write_bytes(data)
                return publish_new(partial, target)

    def replace(self, path: str, data: bytes) -> None:
        """Write a file whole, over one that may be there."""
        with self._writing(path):
            root = self.local_root
            if root is None:
                self._fs.pipe_file(self._at(path), data)
                return
            with partial_beside(root / path) as partial:
                partial.write_bytes(data)
                publish(partial, root / path)

    @contextmanager
    def writing(self, path: str) -> Iterator[Path]:
        """A local file to fill: ``path`` once the block ends, nothing if it raises."""
        with self._writing(path, errors=OSError):
            root = self.local_root
            if root is not None:
                with partial_beside(root / path) as partial:
                    yield partial
                    publish(partial, root / path)
                return
            with tempfile.TemporaryDirectory(prefix="kdstore-") as folder:
                partial = Path(folder) / "partial"
                yield partial
                with self._writing(path):
                    self._fs.put_file(str(partial), self._at(path))

    @property
    def _opened(self) -> tuple[Any, str]:
        """This process's file system, and the folder's path in it.

        A forked child opens its own. What it inherits stays referenced here: its event loop does
        not run in the child, and closing it would touch sockets that the parent still uses.
        """
        process = os.getpid()
        if process not in self._opened_in:
            fs, root = fsspec.core.url_to_fs(self.url, **_options(self.url, self.storage_options))
            self._opened_in[process] = fs, str(root).rstrip("/")
        return self._opened_in[process]

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    @property
    def _fresh_fs(self) -> Any:
        """The file system without the listings it remembers: others may have written since."""
        fs = self._fs
        fs.invalidate_cache()
        return fs

    def _at(self, path: str) -> str:
        root = self._opened[1]
        return f"{root}/{path}" if path else root or "/"

    def _create_remote(self, path: str, data: bytes) -> bool:
        if self.exists(path):
            return False
        try:
            self._fs.pipe_file(self._at(path), data, mode="create")
        except OSError:  # servers answer a taken name with one of several errors
            if not self.exists(path):
                raise
            # Taken by ourselves where an answer was lost and the client sent the same again.
            return self.read(path) == data
        return True

    def _reading(self, path: str, ask: Callable[[], T]) -> T:
        try:
            return ask() if self.local_root is not None else retrying(ask)
        except (KDStoreError, *_MISSING):
            raise
        except Exception as error:  # botocore and aiohttp raise outside OSError
            todo = "check address, permissions, credentials and connection, then try again"
            raise self._storage_error("cannot read", path, error, todo) from error

    @contextmanager
    def _writing(
        self, path: str, what: str = _REFUSED, *, errors: type[Exception] = Exception
    ) -> Iterator[None]:
        try:
            yield
        except KDStoreError:
            raise
        except errors as error:
            todo = "free space or mend permissions, then run the same command again: it resumes"
            raise self._storage_error(what, path, error, todo) from error

    def _storage_error(self, what: str, path: str, error: Exception, todo: str) -> StorageError:
        reason = getattr(error, "strerror", None) or error
        got = f"{type(error).__name__}: {reason}"
        return StorageError(what, where=self.location(path), got=got, todo=todo)


class _RangeFile(io.RawIOBase):
    """A file of a folder of which every read is one ranged request.

    It holds no handle, whose position or connection a forked child would share with its parent, and
    reads nothing ahead: s3fs's own files fetch 50 MiB for a row group of 4.
    """

    def __init__(self, folder: Folder, path: str) -> None:
        super().__init__()
        self._folder, self._path = folder, path
        self._position, self._size = 0, folder.size(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (0, self._position, self._size)[whence] + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self._size - self._position)
        length = rest if size is None or size < 0 else min(size, rest)
        end = self._position + length
        (data,) = self._folder.read_ranges(self._path, [(self._position, end)])
        self._position = end
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _options(url: str, options: dict[str, Any]) -> dict[str, Any]:
    if not url.startswith(("s3://", "s3a://")):
        return options
    return {**options, "config_kwargs": {**_S3_CONFIG, **options.get("config_kwargs", {})}}


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
