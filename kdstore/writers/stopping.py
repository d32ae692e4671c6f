"""SIGTERM and SIGINT: the first one asks to stop, the second one stops."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_DEFAULTS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
PASSED_ON_S = 1.0  # torchrun answers a Ctrl-C, which its workers have seen, with SIGTERM to them


class Stopping:
    """Which signal has asked to stop, if any."""

    def __init__(self, *, quiet: bool = True) -> None:
        self.asked_by: str | None = None
        self._asked_s = 0.0
        self._quiet = quiet

    def handle(self, number: int, frame: FrameType | None) -> None:
        """A signal handler; raises KeyboardInterrupt at the second signal."""
        name, now_s = signal.Signals(number).name, time.monotonic()
        if self.asked_by is None:
            self.asked_by, self._asked_s = name, now_s
            if not self._quiet:
                text = (
                    f"\nkdstore: {name}: the units in work are finished; once more stops at once\n"
                )
                with suppress(OSError):
                    os.write(2, text.encode())  # print is not reentrant
        elif name == self.asked_by or now_s - self._asked_s > PASSED_ON_S:
            raise KeyboardInterrupt


@contextmanager
def stopping_on_signals(*, quiet: bool) -> Iterator[Stopping]:
    """Handles the signals until the block ends, in the main thread and where no one else does."""
    stopping, before = Stopping(quiet=quiet), {}
    if threading.current_thread() is threading.main_thread():
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) is default:
                before[number] = signal.signal(number, stopping.handle)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
