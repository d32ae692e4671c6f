"""Orphans: files of attempts that no commit names, left by processes that were killed."""

from __future__ import annotations

import time
from dataclasses import dataclass

from kdstore.commit import load_commits, read_part
from kdstore.filesystem import Folder
from kdstore.header import Header
from kdstore.layout import COMMITS, DATA, HEADER, TOKENIZER, is_partial, is_shard_path


@dataclass(frozen=True)
class Orphan:
    """A file that no reader will ever open, its size and its age."""

    path: str
    bytes: int
    age_s: float


def find_orphans(folder: Folder, *, older_than_s: float) -> list[Orphan]:
    """The orphans of a store that were last written at least so long ago.

    Younger ones may belong to a dump that is still running. Raises HeaderError if the folder is no
    store, or one whose commits cannot be read.
    """
    header = Header.from_bytes(read_part(folder, HEADER), where=folder.location(HEADER))
    named = {commit.shard.path for commit in load_commits(folder, header).values()}
    paths = [f"{part}/{name}" for part in (DATA, COMMITS, TOKENIZER) for name in folder.names(part)]
    paths += folder.names()
    found = [
        path for path in paths if is_partial(path) or (is_shard_path(path) and path not in named)
    ]
    now_s = time.time()
    orphans = [Orphan(p, folder.size(p), now_s - folder.modified_s(p)) for p in found]
    return [orphan for orphan in orphans if orphan.age_s >= older_than_s]
