"""Input files on any fsspec file system: finding, opening and hashing them."""

from __future__ import annotations

import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
import xxhash
import zstandard

from kdstore.errors import InputError, MissingDependencyError, UsageError
from kdstore.inputs.base import Source
from kdstore.inputs.zstd import ZstdFrames

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """One file: its file system, its path there, and its name as the user would write it."""

    fs: Any
    path: str
    location: str

    @property
    def stem(self) -> str:
        """File name without its suffixes (``a.jsonl.gz`` is ``a``)."""
        return PurePosixPath(strip_compression(self.path)).stem

    @contextmanager
    def open(self, *, decompress: bool = False) -> Iterator[IO[bytes]]:
        """The file opened for reading bytes; what cannot be read raises InputError."""
        zstd = decompress and self.path.endswith(".zst")
        compression = "infer" if decompress and not zstd else None
        with (
            refusing_unreadable(self.location),
            self.fs.open(self.path, "rb", compression=compression) as stream,
        ):
            yield io.BufferedReader(ZstdFrames(stream)) if zstd else stream

    def fingerprint(self) -> dict[str, Any]:
        """``name``, ``bytes`` and ``xxh3_128`` (hex) of the file as it lies on disk."""
        digest, num_bytes = xxhash.xxh3_128(), 0
        with self.open() as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                num_bytes += len(block)
        name = PurePosixPath(self.path).name
        return {"name": name, "bytes": num_bytes, "xxh3_128": digest.hexdigest()}


class FileSource(Source):
    """Rows of one or several files of one kind, one file after the other."""

    kind: str

    def __init__(self, files: list[InputFile], *, name: str, location: str) -> None:
        self.files = files
        self.name = name
        self.location = location
        self._fingerprint: dict[str, Any] | None = None

    def fingerprint(self) -> dict[str, Any]:
        """Kind, name and the hash of every file; reads all bytes once."""
        if self._fingerprint is None:
            files = [file.fingerprint() for file in self.files]
            self._fingerprint = {"kind": self.kind, "name": self.name, "files": files}
        return self._fingerprint


def strip_compression(path: str) -> str:
    """The path without a compression suffix."""
    return next((path.removesuffix(s) for s in COMPRESSIONS if path.endswith(s)), path)


def file_system_of(location: str) -> tuple[Any, str]:
    """(file system, path on it) of a path or URL.

    Raises UsageError for an unknown protocol, MissingDependencyError where its package is absent.
    """
    try:
        return fsspec.core.url_to_fs(location)  # type: ignore[no-any-return]
    except ImportError as error:
        raise MissingDependencyError(
            "the file system of this URL needs another package",
            where=location,
            got=error,
            todo="install the package that the message names",
        ) from error
    except ValueError as error:
        raise UsageError(
            "cannot open this URL", where=location, expected="a path or fsspec URL", got=error
        ) from error


def files_under(fs: Any, path: str, location: str) -> list[InputFile]:
    """The files of a directory in path order; names that begin with ``.`` or ``_`` are left out."""
    root = path.rstrip("/")
    found = []
    for name in sorted(fs.find(root)):
        relative = name.removeprefix(root).lstrip("/")
        if not any(part.startswith((".", "_")) for part in relative.split("/")):
            found.append(InputFile(fs, name, f"{location.rstrip('/')}/{relative}"))
    return found


@contextmanager
def refusing_unreadable(location: str) -> Iterator[None]:
    """Turns what a file system or decompressor raises into InputError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise InputError(
            "cannot read the input file",
            where=location,
            expected="a readable, whole file",
            got=f"{type(error).__name__}: {error}",
            todo="check the path, its permissions and that the file was copied completely",
        ) from error
