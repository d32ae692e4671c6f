"""Commits: the records that make shards exist, and the manifest that gathers them.

A shard that no commit names does not exist. A commit is one small file, written whole; a manifest
is nothing but many commits in one table, so anyone can rebuild it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from kdstore.errors import HeaderError
from kdstore.filesystem import Folder
from kdstore.header import MAX_HEADER_BYTES, Header, parse_json_object
from kdstore.layout import (
    COMMITS,
    commit_path,
    count_of_manifest,
    is_shard_path,
    manifest_path,
    unit_of_commit,
)
from kdstore.parquet import MAX_FOOTER_BYTES, read_table

_SCHEMA = pa.schema(
    [
        ("unit", pa.int64()),
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
        ("scored", pa.int64()),
        ("xxh3_128", pa.string()),
        ("footer_bytes", pa.int64()),
        ("footer_xxh3", pa.string()),
        ("config_digest", pa.string()),
        ("commit", pa.string()),
    ]
)


_MOST = {
    "bytes": 1 << 48,
    "rows": (1 << 31) - 1,
    "tokens": 1 << 48,
    "scored": 1 << 48,
    "footer_bytes": MAX_FOOTER_BYTES,
}
_MOST_OF_A_SUM = 1e300
_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
MAX_PART_BYTES = 1 << 32
T = TypeVar("T")


@dataclass(frozen=True)
class ShardRecord:
    """One file of a commit: where it is, what is in it, and the hashes of it and its footer."""

    path: str
    bytes: int
    rows: int
    tokens: int
    scored: int
    xxh3_128: str
    footer_bytes: int
    footer_xxh3: str


@dataclass(frozen=True)
class Commit:
    """What a unit's work produced. ``statistics`` and ``provenance`` are for people."""

    unit: int
    shard: ShardRecord
    config_digest: str
    statistics: dict[str, Any]
    provenance: dict[str, Any]

    def to_bytes(self) -> bytes:
        """The JSON of a commit file."""
        content = {
            "unit": self.unit,
            "files": [{"role": "main", **asdict(self.shard)}],
            "config_digest": self.config_digest,
            "statistics": self.statistics,
            "provenance": self.provenance,
        }
        return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode("utf-8")

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Commit:
        """The commit in a file's bytes; HeaderError if it lacks a field or leaves the store."""
        content = parse_json_object(data, where=where)
        try:
            files = {file["role"]: file for file in content["files"]}
            record = {name: files["main"][name] for name in ShardRecord.__dataclass_fields__}
            commit = cls(
                _checked(content["unit"], int),
                _checked_record(record),
                _checked(content["config_digest"], str),
                _checked_statistics(_checked(content["statistics"], dict)),
                _checked(content["provenance"], dict),
            )
            _numbers({"padding_mass": commit.provenance.get("padding_mass", 0)})
        except (KeyError, TypeError, ValueError) as error:
            raise HeaderError(
                "damaged commit", where=where, got=f"{type(error).__name__}: {error}"
            ) from error
        return commit


def _checked_record(record: dict[str, Any]) -> ShardRecord:
    for name, most in _MOST.items():
        if not 0 <= _checked(record[name], int) <= most:
            raise ValueError(f"{name} is {record[name]}, not 0 to {most}")
    if not is_shard_path(_checked(record["path"], str)):
        raise ValueError(f"{record['path']!r} is no path of a shard in the store")
    for name in ("xxh3_128", "footer_xxh3"):
        _checked(record[name], str)
    return ShardRecord(**record)


def _checked_statistics(statistics: dict[str, Any]) -> dict[str, Any]:
    sums = _checked(statistics.get("scalar_sums", {}), dict)
    _numbers(sums)
    _numbers({name: statistics.get(name, 0) for name in ("entries", "kept_mass", "audited")})
    return statistics


def _numbers(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if type(value) not in (int, float) or not abs(value) < _MOST_OF_A_SUM:
            raise ValueError(f"{name} is no number: {value!r}")


def _checked(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} expected, found {value!r}")
    return value


def manifest_bytes(commits: Sequence[Commit]) -> bytes:
    """A Parquet table of commits, in order of unit, each with its JSON beside the flat columns."""
    rows = [
        {
            "unit": commit.unit,
            **asdict(commit.shard),
            "config_digest": commit.config_digest,
            "commit": commit.to_bytes().decode("utf-8"),
        }
        for commit in sorted(commits, key=lambda commit: commit.unit)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def read_manifest(data: bytes, *, where: str) -> list[Commit]:
    """The commits of a manifest, in order of unit; HeaderError if it is damaged."""
    try:
        texts = read_table(data)["commit"].to_pylist()
        commits = [_commit_of_row(text, where) for text in texts]
        if any(one.unit >= other.unit for one, other in pairwise(commits)):
            raise ValueError("units that do not ascend")
    except HeaderError:
        raise
    except (pa.ArrowException, KeyError, OSError, ValueError, TypeError) as error:
        raise HeaderError(
            "cannot read the manifest",
            where=where,
            got=error,
            todo="remove it: the commits hold the same, and the next dump writes it again",
        ) from error
    return commits


def _commit_of_row(text: Any, where: str) -> Commit:
    return Commit.from_bytes(_checked(text, str).encode("utf-8"), where=where)


def read_part(folder: Folder, path: str) -> bytes:
    """A file that every store has; HeaderError if this one lacks it, or it is too large."""
    try:
        data = folder.read(path, max_bytes=MAX_PART_BYTES)
    except _NO_FILE as error:
        raise HeaderError(
            "the store lacks one of its files",
            where=folder.location(path),
            expected=path,
            got="no such file",
            todo="restore it from a copy of the store",
        ) from error
    if len(data) > MAX_PART_BYTES:
        where = folder.location(path)
        raise HeaderError("file is too large", where=where, expected=f"at most {MAX_PART_BYTES}")
    return data


def load_commits(folder: Folder, header: Header) -> dict[int, Commit]:
    """All commits of a store by unit, in order of unit.

    The largest manifest first; the commits folder is listed only where that leaves units open.
    Raises HeaderError for a damaged commit, or one of another store.
    """
    commits = _latest_manifest(folder)
    if len(commits) < header.num_units:
        listed = [unit_of_commit(name) for name in folder.names(COMMITS)]
        units = [unit for unit in listed if unit is not None and unit not in commits]
        paths = [commit_path(unit) for unit in units]
        for unit, path, data in zip(units, paths, _read_commits(folder, paths), strict=True):
            commits[unit] = Commit.from_bytes(data, where=folder.location(path))
    for unit, commit in commits.items():
        _check_commit(commit, unit, header, where=folder.location(commit_path(unit)))
    return dict(sorted(commits.items()))


def _read_commits(folder: Folder, paths: list[str]) -> list[bytes]:
    try:
        return folder.read_many(paths, max_bytes=MAX_HEADER_BYTES)
    except _NO_FILE as error:
        raise HeaderError(
            "a commit cannot be read",
            where=folder.location(COMMITS),
            expected="files that stay",
            got=error,
            todo="restore it from a copy of the store, or run the same dump again",
        ) from error


def _latest_manifest(folder: Folder) -> dict[int, Commit]:
    counts = [count_of_manifest(name) for name in folder.names()]
    latest = max((count for count in counts if count is not None), default=None)
    if latest is None:
        return {}
    path = manifest_path(latest)
    commits = read_manifest(read_part(folder, path), where=folder.location(path))
    return {commit.unit: commit for commit in commits}


def _check_commit(commit: Commit, unit: int, header: Header, *, where: str) -> None:
    if commit.unit != unit or not 0 <= unit < header.num_units:
        raise HeaderError(
            "a commit names a unit that is not its own",
            where=where,
            expected=f"unit {unit} of {header.num_units}",
            got=commit.unit,
        )
    if commit.config_digest != header.config_digest:
        raise HeaderError(
            "a commit belongs to another store",
            where=where,
            expected=header.config_digest,
            got=commit.config_digest,
            todo="remove files that were copied in from another store",
        )
