"""Orphans: files of attempts that no commit names, left by processes that were killed."""

from __future__ import annotations

import time
from dataclasses import dataclass

from kdstore.commit import load_commits
from kdstore.filesystem import Folder
from kdstore.header import read_header
from kdstore.layout import COMMITS, DATA, TOKENIZER, is_partial, is_shard_path


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
    named = {commit.shard.path for commit in load_commits(folder, read_header(folder)).values()}
    paths = [f"{part}/{name}" for part in (DATA, COMMITS, TOKENIZER) for name in folder.names(part)]
    paths += folder.names()
    found = [
        path for path in paths if is_partial(path) or (is_shard_path(path) and path not in named)
    ]
    orphans = [_orphan(folder, path) for path in found]
    return [orphan for orphan in orphans if orphan and orphan.age_s >= older_than_s]


def _orphan(folder: Folder, path: str) -> Orphan | None:
    """What is known of a file; None if a running dump renamed or removed it meanwhile."""
    try:
        return Orphan(path, folder.size(path), time.time() - folder.modified_s(path))
    except FileNotFoundError:
        return None
