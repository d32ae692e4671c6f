"""Commits: the records that make shards exist, and the manifest that gathers them.

A shard that no commit names does not exist. A commit is one small file, written whole; a manifest
is nothing but many commits in one table, so anyone can rebuild it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdstore.errors import HeaderError
from kdstore.filesystem import Folder
from kdstore.header import Header, parse_json_object
from kdstore.layout import (
    COMMITS,
    commit_path,
    count_of_manifest,
    is_shard_path,
    manifest_path,
    unit_of_commit,
)

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
                int(content["unit"]),
                _checked_record(record),
                str(content["config_digest"]),
                dict(content["statistics"]),
                dict(content["provenance"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise HeaderError(
                "damaged commit", where=where, got=f"{type(error).__name__}: {error}"
            ) from error
        return commit


def _checked_record(record: dict[str, Any]) -> ShardRecord:
    numbers = ("bytes", "rows", "tokens", "scored", "footer_bytes")
    if any(not isinstance(record[name], int) or record[name] < 0 for name in numbers):
        raise ValueError(f"a size or count is no number: {record}")
    if not is_shard_path(str(record["path"])):
        raise ValueError(f"{record['path']!r} is no path of a shard in the store")
    return ShardRecord(**record)


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
    """The commits of a manifest; HeaderError if it is damaged."""
    try:
        texts = read_parquet(data)["commit"].to_pylist()
    except (pa.ArrowException, KeyError, OSError) as error:
        raise HeaderError(
            "cannot read the manifest",
            where=where,
            got=error,
            todo="remove it: the commits hold the same, and the next dump writes it again",
        ) from error
    return [Commit.from_bytes((text or "").encode("utf-8"), where=where) for text in texts]


def read_parquet(data: bytes) -> pa.Table:
    """The table in a Parquet file's bytes, read by this thread alone.

    ``pq.read_table`` leaves threads behind that hold the bytes; one that lets go while the
    interpreter shuts down aborts the process (seen in 9 of 20 runs).
    """
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    return file.read(use_threads=False)


def read_part(folder: Folder, path: str) -> bytes:
    """A file that every store has; HeaderError if this one lacks it."""
    try:
        return folder.read(path)
    except FileNotFoundError as error:
        raise HeaderError(
            "the store lacks one of its files",
            where=folder.location(path),
            expected=path,
            got="no such file",
            todo="restore it from a copy of the store",
        ) from error


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
        for unit, path, data in zip(units, paths, folder.read_many(paths), strict=True):
            commits[unit] = Commit.from_bytes(data, where=folder.location(path))
    for unit, commit in commits.items():
        _check_commit(commit, unit, header, where=folder.location(commit_path(unit)))
    return dict(sorted(commits.items()))


def _latest_manifest(folder: Folder) -> dict[int, Commit]:
    counts = [count_of_manifest(name) for name in folder.names()]
    latest = max((count for count in counts if count is not None), default=None)
    if latest is None:
        return {}
    path = manifest_path(latest)
    commits = read_manifest(folder.read(path), where=folder.location(path))
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
