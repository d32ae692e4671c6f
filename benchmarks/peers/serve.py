"""The other end of ``benchmarks.load``: a side answers requests, a JSON line each.

A side is timed only while it iterates: it waits, asleep, while others are timed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.peers.arrays import Tensors, content

Batches = Iterator[Tensors | None]


class Side(Protocol):
    """One library with its data on disk."""

    bytes_on_disk: int
    version: str

    def epochs(self, *, workers: int, count: int) -> Batches:
        """The batches of several epochs from one loader; None after each epoch."""


def serve(make: Callable[[Path, Path], Side]) -> None:
    """Make the side of ``PROGRAM PAYLOAD FOLDER`` and answer: what ``benchmarks.load`` asks."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    side = make(Path(sys.argv[1]), Path(sys.argv[2]))
    ready = {"bytes_on_disk": side.bytes_on_disk, "version": side.version}
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = REQUESTS[request.pop("do")](side, **request)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {lines[0]} … {lines[-1]}"}
        answers.write(json.dumps(answer) + "\n")


def timed(side: Side, *, workers: int, epochs: int) -> dict[str, Any]:
    """Seconds and tokens of some epochs, after one that warms up; one core without workers."""
    use_cores(1 if workers == 0 else None)
    tokens, left, start = 0, epochs + 1, time.perf_counter()
    for batch in side.epochs(workers=workers, count=left):
        if batch is not None:
            tokens += batch["input_ids"].numel()
            continue
        left -= 1
        if left == epochs:
            tokens, start = 0, time.perf_counter()
    return {"tokens": tokens, "seconds": time.perf_counter() - start}


def checked(side: Side, *, workers: int) -> dict[str, Any]:
    """Sums over the content of an epoch."""
    sums: Any = Counter()
    for batch in side.epochs(workers=workers, count=1):
        if batch is not None:
            sums.update(content(batch))
            sums["batches"] += 1
    return dict(sums)


def resident(side: Side, *, after: list[int]) -> dict[str, Any]:
    """Resident memory in MB after so many epochs without workers."""
    use_cores(1)
    epoch, sizes = 0, []
    for batch in side.epochs(workers=0, count=max(after)):
        if batch is None:
            epoch += 1
            sizes += [_resident_mb()] if epoch in after else []
    return {"resident_mb": sizes}


def fill(side: Side, *, max_length: int) -> dict[str, Any]:
    """How much of packs of ``max_length`` tokens is filled in an epoch."""
    return {"fill": side.fill(max_length)}  # type: ignore[attr-defined]


def bare(side: Side, *, rounds: int) -> dict[str, Any]:
    """Tokens and seconds of what no reader of the store can do without."""
    use_cores(1)
    return dict(side.bare(rounds))  # type: ignore[attr-defined]


REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {
    "time": timed,
    "check": checked,
    "resident": resident,
    "fill": fill,
    "bare": bare,
}


def use_cores(count: int | None) -> None:
    """Pin all threads of this process to the first cores that it may use, or to none."""
    cores = sorted(_ALL_CORES)[:count]
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), cores)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


_ALL_CORES = os.sched_getaffinity(0)
