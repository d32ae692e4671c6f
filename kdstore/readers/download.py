"""A bounded folder of whole shards, fetched from a remote store and shared by many processes.

A shard's file is named by the hash that its commit has, and gets that name once its bytes have that
hash. Who fetches holds a lock on the partial file, which the kernel drops with its holder: what a
killed process leaves is overwritten. Files that are over the limit go, the least recently used
first, but one that is open stays readable.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from kdstore.commit import ShardRecord
from kdstore.errors import StorageError, UsageError
from kdstore.filesystem import Folder

CACHE_DIR, CACHE_BYTES = "KDSTORE_CACHE_DIR", "KDSTORE_CACHE_BYTES"
DEFAULT_CACHE_BYTES = 50_000_000_000
_RANGE_BYTES, _RANGES_AT_ONCE = 8 << 20, 4
_ATTEMPTS = 3
_DIGEST = re.compile(r"[0-9a-f]{32}")
_OURS = re.compile(r"[0-9a-f]{32}\.(parquet|partial)")


class LocalCopy:
    """An opened file of the cache; closed when nobody refers to it any more."""

    max_gap_bytes = 1 << 16

    def __init__(self, handle: int, path: Path) -> None:
        self._handle, self._path = handle, path
        self.size = os.fstat(handle).st_size
        weakref.finalize(self, os.close, handle)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each range; ValueError if the file has become shorter."""
        _touch(self._handle)
        found = [os.pread(self._handle, end - start, start) for start, end in ranges]
        for (start, end), data in zip(ranges, found, strict=True):
            if len(data) != end - start:
                raise ValueError(f"{len(data)} bytes at {start} of {self._path}, not {end - start}")
        return found

    def discard(self) -> None:
        """Remove the file, unless another process has put a new one in its place."""
        if _is_at(self._handle, self._path):
            self._path.unlink(missing_ok=True)


class ShardFiles:
    """Whole shards in a folder, of ``max_bytes`` together; those of other stores may be among them.

    Nothing else in the folder is touched. It holds no state, so that it can be pickled.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def takes(self, folder: Folder, record: ShardRecord) -> bool:
        """Whether to keep a shard: no local one, and none that is larger than the limit alone."""
        return folder.local_root is None and record.bytes <= self.max_bytes

    def find(self, record: ShardRecord) -> LocalCopy | None:
        """A shard's local copy, if there is one; StorageError if the folder cannot be read."""
        if not _DIGEST.fullmatch(record.xxh3_128):
            return None
        with self._in_use():
            return self._opened(self._path(record), record)

    def fetch(self, folder: Folder, record: ShardRecord) -> LocalCopy:
        """A shard's local copy, made if there is none.

        Raises FileNotFoundError if the store lacks it, ValueError if its bytes are not those that
        were committed, and StorageError if it cannot be fetched or kept.
        """
        if not _DIGEST.fullmatch(record.xxh3_128):
            raise ValueError(f"the commit has {record.xxh3_128!r} for an xxh3_128")
        path = self._path(record)
        with self._in_use():
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                copy = self._opened(path, record) or self._fetched(path, folder, record)
                if copy is not None:
                    return copy

    def _path(self, record: ShardRecord) -> Path:
        return self.folder / f"{record.xxh3_128}.parquet"

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self.folder.is_dir():  # the store's file
                raise
            raise StorageError(
                "the local cache of shards cannot be used",
                where=self.folder,
                got=f"{type(error).__name__}: {error.strerror or error}",
                todo=f"free space, mend permissions, or choose another cache_dir ({CACHE_DIR})",
            ) from error

    def _opened(self, path: Path, record: ShardRecord) -> LocalCopy | None:
        with suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            copy = LocalCopy(handle, path)
            if copy.size == record.bytes:
                _touch(handle)
                return copy
            copy.discard()
        return None

    def _fetched(self, path: Path, folder: Folder, record: ShardRecord) -> LocalCopy | None:
        """The shard as this process fetched it; None if another one did meanwhile."""
        partial = path.with_suffix(".partial")
        with _locked(partial) as handle:
            if not _is_at(handle, partial):
                return None
            try:
                if path.exists():
                    partial.unlink()
                    return None
                self._fill(handle, folder, record, keep=partial.name)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            with suppress(FileNotFoundError):  # someone cleared the cache
                partial.rename(path)
            return LocalCopy(os.dup(handle), path)

    def _fill(self, handle: int, folder: Folder, record: ShardRecord, *, keep: str) -> None:
        size = folder.size(record.path)
        if size != record.bytes:
            raise ValueError(f"{size} bytes, committed were {record.bytes}")
        for _ in range(_ATTEMPTS):
            os.ftruncate(handle, 0)  # what a killed process left is not trusted
            os.ftruncate(handle, record.bytes)  # so that others count it
            self._make_room(keep=keep)
            digest = _download(handle, folder, record)
            if digest == record.xxh3_128:
                return
        raise ValueError(f"xxh3_128 is {digest}, committed was {record.xxh3_128}")

    def _make_room(self, *, keep: str) -> None:
        """Remove the least recently used until the rest is within the limit."""
        found: list[tuple[int, int, str]] = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                about = path.lstat()
                if _OURS.fullmatch(path.name) and stat.S_ISREG(about.st_mode):
                    found.append((about.st_mtime_ns, about.st_size, path.name))
        excess = sum(size for _, size, _ in found) - self.max_bytes
        for _, size, name in sorted(found):
            if excess > 0 and name != keep and self._removed(self.folder / name):
                excess -= size

    def _removed(self, path: Path) -> bool:
        """Whether a file is gone: a shard is removed, and a partial file that nobody fills."""
        with suppress(FileNotFoundError):
            if path.suffix == ".parquet":
                path.unlink()
                return True
            handle = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                return False
            finally:
                os.close(handle)
        return True


def shard_files(cache_dir: str | Path | None, cache_bytes: int | None) -> ShardFiles | None:
    """The cache that arguments or else the environment name; None for none, UsageError if wrong."""
    folder = cache_dir if cache_dir is not None else os.environ.get(CACHE_DIR) or None
    size = cache_bytes if cache_bytes is not None else os.environ.get(CACHE_BYTES) or None
    if folder is None:
        if cache_bytes is not None:
            raise UsageError("cache_bytes without a cache_dir", got=cache_bytes)
        return None
    try:
        max_bytes = DEFAULT_CACHE_BYTES if size is None else int(size)
    except ValueError:
        max_bytes = 0
    if max_bytes < 1:
        raise UsageError(
            f"the local cache needs a size (cache_bytes, {CACHE_BYTES})",
            expected="a number of bytes, at least 1",
            got=size,
        )
    return ShardFiles(Path(folder).absolute(), max_bytes=max_bytes)


def _download(handle: int, folder: Folder, record: ShardRecord) -> str:
    """Fill a file with a shard's bytes; their xxh3_128."""
    digest = xxhash.xxh3_128()
    starts = range(0, record.bytes, _RANGE_BYTES)
    ranges = [(start, min(start + _RANGE_BYTES, record.bytes)) for start in starts]
    with open(handle, "r+b", closefd=False) as file:
        file.seek(0)
        for first in range(0, len(ranges), _RANGES_AT_ONCE):
            for data in folder.read_ranges(record.path, ranges[first : first + _RANGES_AT_ONCE]):
                digest.update(data)
                file.write(data)
    return digest.hexdigest()


_LOCKED: set[int] = set()


def _let_go_in_child() -> None:
    """A child's copy of a handle would keep the lock after its parent was killed."""
    while _LOCKED:
        os.close(_LOCKED.pop())


os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A handle of a file that is made if need be, its lock held; waits while another holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    _LOCKED.add(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        if handle in _LOCKED:  # not in a child
            fcntl.flock(handle, fcntl.LOCK_UN)
            _LOCKED.discard(handle)
            os.close(handle)


def _touch(handle: int) -> None:
    """The least recently used goes first; the files of another user keep their times."""
    with suppress(PermissionError):
        os.utime(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
