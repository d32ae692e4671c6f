"""Files on a local disk that appear whole, by rename or link, and survive a power cut.

A file is filled under a name of its own beside the one it will have, synced, named, and the folder
that names it is synced.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def partial_beside(target: Path) -> Iterator[Path]:
    """A name to fill beside a file, removed when the block ends; the folder is made."""
    _make_folder(target.parent)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    try:
        _sync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # no fsync of folders here, as on some network mounts
            raise


def publish(partial: Path, target: Path) -> None:
    """Give a finished file its name, over a file that may have it."""
    _sync(partial)
    partial.replace(target)
    _sync_folder(target.parent)


def publish_new(partial: Path, target: Path) -> bool:
    """Give a finished file its name; False, and nothing changed, if the name is taken."""
    _sync(partial)
    try:
        os.link(partial, target)
    except FileExistsError:
        if not partial.samefile(target):  # NFS may repeat a link whose answer was lost
            return False
    except (OSError, NotImplementedError):  # no hard links here, as on some mounts
        if target.exists():
            return False
        partial.replace(target)
    _sync_folder(target.parent)
    return True


def sync_tree(folder: Path) -> None:
    """Sync every file below a folder, and the folders, that others have written."""
    for path in [folder, *folder.rglob("*")]:
        _sync_folder(path) if path.is_dir() else _sync(path)


def withdraw(target: Path) -> None:
    """Take a file away for good, if it is there."""
    if target.exists():
        target.unlink()
        _sync_folder(target.parent)
