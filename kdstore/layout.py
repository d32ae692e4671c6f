"""Where things lie in a store: the one place that knows its paths."""

from __future__ import annotations

import re

HEADER = "kdstore.json"
ID_ORDER = "idorder.arrow"
PLAN = "plan.parquet"
TOKENIZER = "tokenizer"
DATA = "data"
COMMITS = "commits"
OVERLAYS = "overlays"
RUNNING = "running"
GENERATED = "generated"
GENERATION = f"{GENERATED}/_generation.json"  # "_": no rows, to whoever reads the folder
OVERLAY_HEADER = "overlay.json"  # in the overlay's own folder
MAIN_SIGNAL = "main"
AUDIT_SIGNAL = "audit"
ROW_HASH = "row_hash"

SHARD_PATTERN = r"data/part-[0-9]{6,18}-[0-9a-f]{8}\.parquet"
_SHARD = re.compile(SHARD_PATTERN)
_PARTIAL = re.compile(r"(?:.*/)?\.[^/]+\.[0-9a-f]{8}\.partial", re.DOTALL)
_RECORD = re.compile(r"running/[0-9]{6,18}\.json")
_COMMIT = re.compile(r"([0-9]{6,18})\.json")
_MANIFEST = re.compile(r"manifest-([0-9]{6,18})\.parquet")
_BLOCK = re.compile(r"([0-9]{6,18})\.parquet")
_OVERLAY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def shard_path(unit: int, attempt: str) -> str:
    """Path of one attempt (8 hex digits) at a unit's shard."""
    return f"{DATA}/part-{unit:06d}-{attempt}.parquet"


def is_shard_path(path: str) -> bool:
    """Whether a path from a commit is one that a writer gives, inside the store."""
    return _SHARD.fullmatch(path) is not None


def is_partial(path: str) -> bool:
    """Whether a path is that of a file which was still being written."""
    return _PARTIAL.fullmatch(path) is not None


def commit_path(unit: int) -> str:
    """Path of a unit's commit."""
    return f"{COMMITS}/{unit:06d}.json"


def running_path(unit: int) -> str:
    """Path of the record that a unit is in work, or failed."""
    return f"{RUNNING}/{unit:06d}.json"


def is_running_path(path: str) -> bool:
    """Whether a path is that of such a record."""
    return _RECORD.fullmatch(path) is not None


def unit_of_commit(name: str) -> int | None:
    """The unit whose commit, or running record, has this file name; None for any other file."""
    match = _COMMIT.fullmatch(name)
    return int(match[1]) if match and commit_path(int(match[1])).endswith(f"/{name}") else None


def manifest_path(count: int) -> str:
    """Path of the manifest of ``count`` commits."""
    return f"manifest-{count:06d}.parquet"


def count_of_manifest(name: str) -> int | None:
    """How many commits the manifest of this name holds; None for any other file."""
    match = _MANIFEST.fullmatch(name)
    return int(match[1]) if match and manifest_path(int(match[1])) == name else None


def block_path(block: int) -> str:
    """Path of one block of generated completions."""
    return f"{GENERATED}/{block:06d}.parquet"


def block_of_path(name: str) -> int | None:
    """The block that has this file name; None for any other file."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match and block_path(int(match[1])).endswith(f"/{name}") else None


def overlay_path(name: str) -> str:
    """Folder of a named overlay; in it, paths are those of a store."""
    return f"{OVERLAYS}/{name}"


def is_overlay_name(name: str) -> bool:
    """Whether a name is fit for a folder on any file system."""
    return _OVERLAY_NAME.fullmatch(name) is not None


def hash_column(signal: str) -> str:
    """Column of the hash that covers a named signal; that of ``main`` covers the plain columns."""
    return ROW_HASH if signal == MAIN_SIGNAL else signal_column(signal, ROW_HASH)


def signal_column(signal: str, plane: str) -> str:
    """Column of one plane of a named signal."""
    return f"signal/{signal}/{plane}"
