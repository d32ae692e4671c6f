"""A few threads of one process that read ahead, made when there is something to do."""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

THREADS = 4
MAX_WAITING = 256
_EXIT_S = 2
Job = Callable[[], object]
_Jobs = queue.Queue[Job | None]


class Background:
    """Does jobs, whose errors go nowhere; those above ``MAX_WAITING`` are not done.

    It is pickled empty, and empty in a forked child. The end of the interpreter waits for what is
    under way, but not for long, and not for the rest.
    """

    def __init__(self) -> None:
        self._process = 0
        self._stop: Callable[[], object] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Background, ()

    def submit(self, job: Job) -> None:
        """Have a job done soon."""
        if self._process != os.getpid():
            self._start()
        with suppress(queue.Full):
            self._jobs.put_nowait(job)

    def stop(self) -> None:
        """Drop what waits, and end the threads; a later job starts new ones."""
        if self._process == os.getpid() and self._stop is not None:
            self._stop()
        self._process = 0

    def _start(self) -> None:
        self._process = os.getpid()
        self._jobs: _Jobs = queue.Queue(MAX_WAITING)
        # Daemons, since the interpreter waits for other threads before it calls what ends these.
        threads = [
            threading.Thread(target=_work, args=(self._jobs,), name="kdstore", daemon=True)
            for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        self._stop = weakref.finalize(self, _end, self._process, self._jobs, threads)


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        with suppress(Exception):  # whoever reads what this was to read raises it
            job()
        del job  # it refers to the store that this queue goes with


def _end(process: int, jobs: _Jobs, threads: list[threading.Thread]) -> None:
    if process != os.getpid():  # a fork has copied this, but no thread, and maybe a held lock
        return
    with suppress(queue.Empty):
        while True:
            jobs.get_nowait()
    for _ in threads:
        jobs.put(None)
    last = time.monotonic() + _EXIT_S
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0, last - time.monotonic()))
