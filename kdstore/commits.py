"""All commits of a store, or of an overlay, as readers and writers find them.

However many there are, they are held as columns. A ``Commit`` is parsed from its JSON when somebody
asks for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kdstore.commit import NO_FILE, Commit, ShardRecord, read_part
from kdstore.errors import HeaderError
from kdstore.filesystem import Folder
from kdstore.header import MAX_HEADER_BYTES, Header
from kdstore.layout import (
    COMMITS,
    commit_path,
    count_of_manifest,
    manifest_path,
    unit_of_commit,
)
from kdstore.manifest import FLAT_COLUMNS, REBUILD, Manifest, flat_row, numbers

_RECORD = tuple(ShardRecord.__dataclass_fields__)


class Commits(Sequence[Commit]):
    """Commits in order of unit. An index counts them; it is a unit only where all are committed.

    HeaderError if a commit that is asked for does not say what the columns say.
    """

    def __init__(
        self, columns: pa.Table, *, manifest: Manifest, files: dict[int, bytes], digest: str
    ) -> None:
        self._manifest, self._digest = manifest, digest
        self._files, self._file_units = files, sorted(files)
        self._fields = {name: columns[name].combine_chunks() for name in _RECORD}
        self.units = numbers(columns, "unit")

    def numbers(self, field: str) -> NDArray[np.int64]:
        """int64 [commits]: ``rows``, ``tokens`` or another number of each shard's record."""
        return np.asarray(self._fields[field].to_numpy(), dtype=np.int64)

    def texts(self, field: str) -> list[str]:
        """``path``, ``xxh3_128`` or ``footer_xxh3`` of each shard's record."""
        return list(self._fields[field].to_pylist())

    def record(self, index: int) -> ShardRecord:
        """The record of one shard, from the columns alone."""
        return ShardRecord(*(self._fields[name][index].as_py() for name in _RECORD))

    def __len__(self) -> int:
        return len(self.units)

    @overload
    def __getitem__(self, index: int) -> Commit: ...

    @overload
    def __getitem__(self, index: slice) -> list[Commit]: ...

    def __getitem__(self, index: int | slice) -> Commit | list[Commit]:
        found = range(len(self))[index]
        return self._commit(found) if isinstance(found, int) else [self._commit(n) for n in found]

    def _commit(self, index: int) -> Commit:
        unit, where = int(self.units[index]), self._manifest.where
        data = self._files.get(unit)
        if data is None:
            data = self._manifest.json(index - bisect_left(self._file_units, unit))
        commit = Commit.from_bytes(data, where=f"{where}, unit {unit}")
        expected = (unit, self.record(index), self._digest)
        found = (commit.unit, commit.shard, commit.config_digest)
        if found != expected:
            raise HeaderError(
                "a commit is not what its manifest's columns say",
                where=f"{where}, unit {unit}",
                expected=expected,
                got=found,
                todo=REBUILD,
            )
        return commit


class CommitsByUnit(Mapping[int, Commit]):
    """Commits by unit; ``ordered`` has the same in order of unit."""

    def __init__(self, ordered: Commits) -> None:
        self.ordered = ordered

    def covers(self, units: NDArray[np.int64]) -> bool:
        """Whether each of these units is committed."""
        return bool(np.isin(units, self.ordered.units).all())

    def index(self, unit: int) -> int:
        """Where a unit's commit is in ``ordered``; KeyError if the unit is not committed."""
        index = int(np.searchsorted(self.ordered.units, unit))
        if index == len(self) or self.ordered.units[index] != unit:
            raise KeyError(unit)
        return index

    def record(self, unit: int) -> ShardRecord:
        """The record of a unit's shard; KeyError if the unit is not committed."""
        return self.ordered.record(self.index(unit))

    def __getitem__(self, unit: int) -> Commit:
        return self.ordered[self.index(unit)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ordered.units.tolist())

    def __len__(self) -> int:
        return len(self.ordered)

    def __contains__(self, unit: object) -> bool:
        return isinstance(unit, int) and self.covers(np.array([unit]))


def load_commits(folder: Folder, header: Header) -> Commits:
    """All commits of a store.

    The largest manifest first; the commits folder is listed only where that leaves units open.
    Raises HeaderError for a damaged commit, or one of another store.
    """
    manifest = _latest_manifest(folder)
    columns, files = manifest.columns(), {}
    if len(columns) < header.num_units:
        files = _files_beside(folder, numbers(columns, "unit"))
        commits = [_commit_of_file(unit, data, folder) for unit, data in files.items()]
        rows = [flat_row(commit) for commit in commits]
        columns = _in_order([columns, pa.Table.from_pylist(rows, schema=FLAT_COLUMNS)])
    _check_of_store(columns, header, folder)
    return Commits(columns, manifest=manifest, files=files, digest=header.config_digest)


def _latest_manifest(folder: Folder) -> Manifest:
    counts = [count_of_manifest(name) for name in folder.names()]
    latest = max((count for count in counts if count is not None), default=None)
    if latest is None:
        return Manifest(None, where=folder.location(COMMITS))
    path = manifest_path(latest)
    return Manifest(read_part(folder, path), where=folder.location(path))


def _files_beside(folder: Folder, gathered: NDArray[np.int64]) -> dict[int, bytes]:
    """The commit files of units that the manifest does not have."""
    known = set(gathered.tolist())
    listed = [unit_of_commit(name) for name in folder.names(COMMITS)]
    units = [unit for unit in listed if unit is not None and unit not in known]
    try:
        found = folder.read_many(list(map(commit_path, units)), max_bytes=MAX_HEADER_BYTES)
    except NO_FILE as error:
        raise HeaderError(
            "a commit cannot be read",
            where=folder.location(COMMITS),
            expected="files that stay",
            got=error,
            todo="restore it from a copy of the store, or run the same dump again",
        ) from error
    return dict(zip(units, found, strict=True))


def _commit_of_file(unit: int, data: bytes, folder: Folder) -> Commit:
    where = folder.location(commit_path(unit))
    commit = Commit.from_bytes(data, where=where)
    if commit.unit != unit:
        raise HeaderError(
            "a commit names a unit that is not its own",
            where=where,
            expected=f"unit {unit}",
            got=commit.unit,
        )
    return commit


def _in_order(tables: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables)
    return table.take(np.argsort(numbers(table, "unit")))


def _check_of_store(columns: pa.Table, header: Header, folder: Folder) -> None:
    """HeaderError unless all units are the store's, and all commits name it."""
    units = numbers(columns, "unit")
    for unit in units[(units < 0) | (units >= header.num_units)][:1].tolist():
        raise HeaderError(
            "a commit names a unit that is not its store's",
            where=folder.location(commit_path(unit)),
            expected=f"0 to {header.num_units - 1}",
            got=unit,
        )
    foreign = columns.filter(pc.not_equal(columns["config_digest"], header.config_digest))
    for row in foreign.slice(0, 1).to_pylist():
        raise HeaderError(
            "a commit belongs to another store",
            where=folder.location(commit_path(row["unit"])),
            expected=header.config_digest,
            got=row["config_digest"],
            todo="remove files that were copied in from another store",
        )
