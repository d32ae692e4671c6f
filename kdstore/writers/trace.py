"""Running records: which units are in work, and where one failed. Advisory, for ``kdstore status``.

One small file a unit, written when a worker takes it up and removed when it is committed. Nothing
depends on them: they may be lost, left behind by a kill, or overwritten by another worker.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Container
from contextlib import suppress
from dataclasses import asdict, dataclass

from kdstore.errors import HeaderError, StorageError
from kdstore.filesystem import Folder
from kdstore.header import parse_json_object
from kdstore.layout import RUNNING, running_path, unit_of_commit

MAX_RECORD_BYTES = 1 << 16
MAX_ERROR_CHARS = 2000


@dataclass(frozen=True)
class Trace:
    """Who has taken up a unit, and when, in seconds since 1970; ``error``: why it failed."""

    unit: int
    host: str
    pid: int
    since_s: float
    error: str | None = None


class Tracer:
    """Writes the records of this process; storage that refuses them is no failure of the dump."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._open: set[int] = set()

    def start(self, unit: int) -> None:
        """A unit is taken up."""
        self._open.add(unit)
        self._write(unit, None)

    def done(self, unit: int) -> None:
        """A unit is committed, or given back."""
        self._open.discard(unit)
        with suppress(StorageError):
            self._folder.remove(running_path(unit))

    def failed(self, unit: int, error: BaseException) -> None:
        """A unit is given up; the record stays until the unit is taken up again."""
        self._open.discard(unit)
        self._write(unit, f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS])

    def close(self) -> None:
        """Gives back what is neither committed nor failed."""
        for unit in sorted(self._open):
            self.done(unit)

    def _write(self, unit: int, error: str | None) -> None:
        trace = Trace(unit, socket.gethostname(), os.getpid(), round(time.time(), 3), error)
        with suppress(StorageError):
            data = (json.dumps(asdict(trace), indent=1) + "\n").encode()
            self._folder.replace(running_path(unit), data)


def read_traces(folder: Folder, *, committed: Container[int]) -> list[Trace]:
    """The records of units that are not committed, in order of unit; damaged ones are left out."""
    units = [unit_of_commit(name) for name in folder.names(RUNNING)]
    found = [_read(folder, unit) for unit in units if unit is not None and unit not in committed]
    return [trace for trace in found if trace is not None]


def remove_traces(folder: Folder) -> None:
    """Remove all records, as when all units are committed."""
    for name in folder.names(RUNNING):
        if unit_of_commit(name) is not None:
            with suppress(StorageError):
                folder.remove(f"{RUNNING}/{name}")
    folder.remove_folder(RUNNING)


def _read(folder: Folder, unit: int) -> Trace | None:
    path = running_path(unit)
    try:
        data = folder.read(path, max_bytes=MAX_RECORD_BYTES)
        content = parse_json_object(data, where=folder.location(path))
        error = content["error"]
        return Trace(
            unit,
            str(content["host"]),
            int(content["pid"]),
            float(content["since_s"]),
            None if error is None else str(error),
        )
    except (FileNotFoundError, HeaderError, KeyError, TypeError, ValueError):
        return None
