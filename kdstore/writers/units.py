"""The commit protocol: makes the units of a store, or of an overlay, exist by committing them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from kdstore.commit import Commit
from kdstore.commits import load_commits
from kdstore.errors import StorageError
from kdstore.filesystem import Folder
from kdstore.header import Header
from kdstore.layout import commit_path, manifest_path, shard_path
from kdstore.manifest import manifest_bytes
from kdstore.sample import Sample
from kdstore.writers.shard import ShardWriter, row_groups
from kdstore.writers.trace import remove_traces

COMMITS_PER_MANIFEST = 1000


class UnitWriter:
    """The folder that a header describes, the units that are committed, and a writer of shards."""

    def __init__(self, folder: Folder, header: Header, shards: ShardWriter) -> None:
        self.folder, self.header, self.shards = folder, header, shards
        self.commits = self._load()

    def pending_units(self, *, worker: int = 0, num_workers: int = 1) -> list[int]:
        """Units that no commit names yet, of those that fall to one of several workers."""
        units = range(worker, self.header.num_units, num_workers)
        return [unit for unit in units if unit not in self.commits]

    def commit(
        self,
        unit: int,
        samples: Sequence[Sample],
        *,
        statistics: dict[str, Any],
        provenance: dict[str, Any],
    ) -> Commit:
        """Write a unit's shard under a name of its own, then the commit that makes it exist.

        Where another worker committed the unit first, its shard stays and ours is removed: any
        complete attempt of a unit is as good as another. ``write_seconds`` join the provenance.
        """
        started_s = time.monotonic()
        path = shard_path(unit, secrets.token_hex(4))
        with self.folder.writing(path) as target:
            record = self.shards.write(target, self.row_groups(unit, samples), path=path)
        provenance = {**provenance, "write_seconds": round(time.monotonic() - started_s, 3)}
        commit = Commit(unit, record, self.header.config_digest, statistics, provenance)
        if not self.folder.create(commit_path(unit), commit.to_bytes()):
            name = commit_path(unit)
            commit = Commit.from_bytes(self.folder.read(name), where=self.folder.location(name))
            if commit.shard.path != path:  # else the create went through and its answer was lost
                with suppress(StorageError):  # an orphan is harmless
                    self.folder.remove(path)
        self.commits[unit] = commit
        if len(self.commits) % COMMITS_PER_MANIFEST == 0:
            self._write_manifest()
        return commit

    def row_groups(self, unit: int, samples: Sequence[Sample]) -> list[list[Sample]]:
        """A unit's samples as the row groups of its shard."""
        return list(row_groups(samples))

    def seal(self) -> bool:
        """Write the manifest of all units if every one is committed; whether that is so."""
        self.commits = self._load()
        complete = len(self.commits) == self.header.num_units
        if complete:
            remove_traces(self.folder)
        if complete and not self.folder.exists(manifest_path(len(self.commits))):
            self._write_manifest()
        return complete

    def _load(self) -> dict[int, Commit]:
        return {commit.unit: commit for commit in load_commits(self.folder, self.header)}

    def _write_manifest(self) -> None:
        data = manifest_bytes(list(self.commits.values()))
        self.folder.replace(manifest_path(len(self.commits)), data)
