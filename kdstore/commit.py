"""Commits: the records that make shards exist.

A shard that no commit names does not exist. A commit is one small file, written whole.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from kdstore.errors import HeaderError
from kdstore.filesystem import Folder
from kdstore.header import parse_json_object
from kdstore.layout import is_shard_path
from kdstore.parquet import MAX_FOOTER_BYTES

MAX_OF_RECORD = {
    "bytes": 1 << 48,
    "rows": (1 << 31) - 1,
    "tokens": 1 << 48,
    "scored": 1 << 48,
    "footer_bytes": MAX_FOOTER_BYTES,
}
_MOST_OF_A_SUM = 1e300
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
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
    for name, most in MAX_OF_RECORD.items():
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


def read_part(folder: Folder, path: str) -> bytes:
    """A file that every store has; HeaderError if this one lacks it, or it is too large."""
    try:
        data = folder.read(path, max_bytes=MAX_PART_BYTES)
    except NO_FILE as error:
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
