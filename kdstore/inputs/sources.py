"""open_source: what ``--data`` names, as a Source."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from kdstore.errors import InputError
from kdstore.inputs.base import Source
from kdstore.inputs.files import (
    FileSource,
    InputFile,
    file_system_of,
    files_under,
    refusing_unreadable,
    strip_compression,
)
from kdstore.inputs.hub import is_dataset_name, open_named, open_saved
from kdstore.inputs.jsonlines import JsonLinesSource
from kdstore.inputs.parquet import ParquetSource
from kdstore.inputs.plaintext import PlainTextSource

KINDS: dict[str, type[FileSource]] = {
    ".jsonl": JsonLinesSource,
    ".json": JsonLinesSource,
    ".ndjson": JsonLinesSource,
    ".parquet": ParquetSource,
    ".txt": PlainTextSource,
}
_SAVED_MARKS = ("dataset_dict.json", "state.json")
_ACCEPTED = ".jsonl, .json (lines), .parquet or .txt, or a directory of them"


def open_source(data: str | Path, *, split: str = "train") -> Source:
    """The rows that ``data`` names.

    A JSON-lines, Parquet or plain-text file (path or fsspec URL; JSON lines and text also
    compressed), a directory of files of one of these kinds, a directory written by ``datasets``'
    ``save_to_disk``, or a dataset's name (``NAME`` or ``NAME:CONFIG``). ``split`` matters to the
    last two only. Raises InputError if nothing of that name exists or its kind is unknown, and
    MissingDependencyError where a package is needed.
    """
    location = str(data)
    fs, path = file_system_of(location)
    with refusing_unreadable(location):
        if fs.isfile(path):
            return _open_files([InputFile(fs, path, location)], location=location)
        if fs.isdir(path):
            return _open_directory(fs, path, location, split=split)
    if is_dataset_name(location) and _kind_of(location) is None:
        return open_named(location, split=split, looked_for="a file, a directory")
    raise InputError(
        "no input of this name",
        where=location,
        expected=f"a file ({_ACCEPTED}), a directory saved by `datasets`, or a dataset name",
        got="no such file or directory, and it is not the name of a dataset",
        todo="check the path",
    )


def _kind_of(path: str) -> type[FileSource] | None:
    return KINDS.get(PurePosixPath(strip_compression(path)).suffix.lower())


def _open_directory(fs: Any, path: str, location: str, *, split: str) -> Source:
    name = PurePosixPath(path.rstrip("/")).name
    if any(fs.exists(f"{path.rstrip('/')}/{mark}") for mark in _SAVED_MARKS):
        return open_saved(location, split=split, name=name)
    files = [file for file in files_under(fs, path, location) if _kind_of(file.path) is not None]
    return _open_files(files, location=location, name=name)


def _open_files(files: list[InputFile], *, location: str, name: str | None = None) -> Source:
    """The files as one source. Raises InputError unless all are of one known kind."""
    kinds = {_kind_of(file.path) for file in files}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is not None:
        return kind(files, name=name or files[0].stem, location=location)
    raise InputError(
        "unknown kind of input",
        where=location,
        expected=f"{_ACCEPTED}, of one kind, or a directory saved by `datasets`",
        got=_found(files),
        todo="convert the data to JSON lines, or name one file",
    )


def _found(files: list[InputFile]) -> str:
    suffixes = sorted({PurePosixPath(strip_compression(f.path)).suffix or "none" for f in files})
    return f"files with suffix {', '.join(suffixes)}" if files else "a directory without such files"
