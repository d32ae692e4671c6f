"""Orphans: files of attempts that no commit names, left by processes that were killed."""

from __future__ import annotations

import time
from dataclasses import dataclass

from kdstore.commits import Commits, load_commits
from kdstore.filesystem import Folder
from kdstore.header import read_header
from kdstore.layout import (
    COMMITS,
    DATA,
    GENERATED,
    RUNNING,
    TOKENIZER,
    is_partial,
    is_running_path,
    is_shard_path,
    overlay_path,
)
from kdstore.overlay import overlay_names, read_overlay


@dataclass(frozen=True)
class Orphan:
    """A file that no reader will ever open, its size and its age."""

    path: str
    bytes: int
    age_s: float


def find_orphans(folder: Folder, *, older_than_s: float) -> list[Orphan]:
    """The orphans of a store that were last written at least so long ago.

    Younger ones may belong to a dump that is still running. Raises StoreNotFoundError if there is
    no store, and HeaderError if its commits cannot be read.
    """
    header = read_header(folder)
    found = _paths_without_commit(folder, load_commits(folder, header))
    for name in overlay_names(folder):
        overlay, inner = read_overlay(folder, name, header), overlay_path(name)
        commits = overlay.commits.ordered if overlay else None
        unnamed = _paths_without_commit(folder.within(inner), commits)
        found += [f"{inner}/{path}" for path in unnamed]
    orphans = [_orphan(folder, path) for path in found]
    return [orphan for orphan in orphans if orphan and orphan.age_s >= older_than_s]


def _paths_without_commit(folder: Folder, commits: Commits | None) -> list[str]:
    """Shards, running records and partial files in the folder of a store, or of an overlay."""
    named = set(commits.texts("path")) if commits is not None else set()
    parts = (DATA, COMMITS, TOKENIZER, GENERATED, RUNNING)
    paths = [f"{part}/{name}" for part in parts for name in folder.names(part)]
    return [
        path
        for path in (*paths, *folder.names())
        if is_partial(path) or is_running_path(path) or (is_shard_path(path) and path not in named)
    ]


def _orphan(folder: Folder, path: str) -> Orphan | None:
    """What is known of a file; None if a running dump renamed or removed it meanwhile."""
    try:
        return Orphan(path, folder.size(path), time.time() - folder.modified_s(path))
    except FileNotFoundError:
        return None
