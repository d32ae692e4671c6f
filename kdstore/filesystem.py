"""One folder on any file system, with the few atomic operations that a store is built from.

Nothing half-written is ever visible: files appear whole, by rename or link on a local disk and by
one finished upload elsewhere. fsspec's write context managers are not used, since they publish what
was written so far when an exception leaves them.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

from kdstore.errors import StorageError


class Folder:
    """A folder named by a path or an fsspec URL; opened lazily, so that it can be pickled."""

    def __init__(self, url: str | os.PathLike[str], **storage_options: Any) -> None:
        self.url = str(url).rstrip("/") or "/"
        self.storage_options = storage_options

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "storage_options": self.storage_options}

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        fs, root = fsspec.core.url_to_fs(self.url, **self.storage_options)
        return fs, str(root).rstrip("/")

    @property
    def local_root(self) -> Path | None:
        """The folder's path if it lies on a local disk, else None."""
        fs, root = self._opened
        return Path(root) if "file" in _protocols(fs) else None

    def location(self, path: str) -> str:
        """The full name of a file, for messages."""
        return f"{self.url}/{path}"

    def read(self, path: str) -> bytes:
        """All bytes of a file; FileNotFoundError if there is none."""
        return bytes(self._fs.cat_file(self._at(path)))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """The bytes ``[start, end)`` of a file."""
        return bytes(self._fs.cat_file(self._at(path), start=start, end=end))

    def size(self, path: str) -> int:
        """Size of a file in bytes; FileNotFoundError if there is none."""
        return int(self._fs.size(self._at(path)))

    def exists(self, path: str = "") -> bool:
        """Whether a file or folder is there."""
        return bool(self._fs.exists(self._at(path)))

    def names(self, path: str = "") -> list[str]:
        """Sorted names of the files and folders in a folder; empty if there is none."""
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._at(path), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def open_file(self, path: str) -> Any:
        """A seekable binary file for reading."""
        return self._fs.open(self._at(path), "rb")

    def remove(self, path: str) -> None:
        """Remove a file; a missing one is fine."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def create(self, path: str, data: bytes) -> bool:
        """Write a new file whole. False, and nothing changed, if there is one already.

        An object store that does not honour conditional writes overwrites instead. Raises
        StorageError if the file system refuses.
        """
        with self._storage_errors(path):
            root = self.local_root
            if root is None:
                return self._create_remote(path, data)
            target = root / path
            with self._partial(target) as partial:
                partial.write_bytes(data)
                return _link_new(partial, target)

    def replace(self, path: str, data: bytes) -> None:
        """Write a file whole, over one that may be there."""
        with self._storage_errors(path):
            root = self.local_root
            if root is None:
                self._fs.pipe_file(self._at(path), data)
                return
            with self._partial(root / path) as partial:
                partial.write_bytes(data)
                _publish(partial, root / path)

    @contextmanager
    def writing(self, path: str) -> Iterator[Path]:
        """A local file to fill: ``path`` once the block ends, nothing if it raises."""
        with self._storage_errors(path):
            root = self.local_root
            if root is not None:
                with self._partial(root / path) as partial:
                    yield partial
                    _publish(partial, root / path)
                return
            with tempfile.TemporaryDirectory(prefix="kdstore-") as folder:
                partial = Path(folder) / "partial"
                yield partial
                self._fs.put_file(str(partial), self._at(path))

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    def _at(self, path: str) -> str:
        root = self._opened[1]
        return f"{root}/{path}" if path else root

    def _create_remote(self, path: str, data: bytes) -> bool:
        if self.exists(path):
            return False
        try:
            self._fs.pipe_file(self._at(path), data, mode="create")
        except FileExistsError:
            return False
        return True

    @contextmanager
    def _partial(self, target: Path) -> Iterator[Path]:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _storage_errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(
                "the file system refused a write; nothing of this file is visible",
                where=self.location(path),
                got=error.strerror or error,
                todo="free space or mend permissions, then run the same command again: it resumes",
            ) from error


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(partial: Path, target: Path) -> None:
    _sync(partial)
    partial.replace(target)
    _sync(target.parent)


def _link_new(partial: Path, target: Path) -> bool:
    """Give a finished file its name unless the name is taken."""
    _sync(partial)
    try:
        os.link(partial, target)
    except FileExistsError:
        return False
    except (PermissionError, NotImplementedError):  # no hard links here, as on some mounts
        if target.exists():
            return False
        partial.replace(target)
    _sync(target.parent)
    return True
