"""Progress on standard error: the one place that draws it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

LINE_INTERVAL_S = 10.0


class Progress:
    """A bar on a terminal, a plain line now and then elsewhere, nothing if quiet.

    ``total``: where it ends, of which ``done`` is behind us. ``extra`` is asked for more to say
    whenever something is drawn.
    """

    def __init__(
        self,
        label: str,
        *,
        total: int | None,
        unit: str,
        done: int = 0,
        quiet: bool = False,
        extra: Callable[[], str] | None = None,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._before = done
        self._terminal = sys.stderr.isatty()
        self._quiet, self._extra = quiet, extra
        self._last_line_s = self._start_s = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit=unit,
            unit_scale=True,
            disable=quiet or not self._terminal,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if error is None and self._draws_lines:
            self._line("done")

    def advance(self, amount: int) -> None:
        """Count work that is finished."""
        self.done += amount
        if self._bar.update(amount) and self._extra is not None:
            self._bar.set_postfix_str(self._extra(), refresh=False)
        if self._draws_lines and time.monotonic() - self._last_line_s > LINE_INTERVAL_S:
            self._line("")

    def expect(self, total: int) -> None:
        """Where it will end, by what is known now."""
        self.total = self._bar.total = total

    def note(self, text: str) -> None:
        """Say how it goes: behind the bar, or on a line."""
        self._bar.set_postfix_str(text)
        if self._draws_lines:
            self._line(text)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    @property
    def _draws_lines(self) -> bool:
        return not self._quiet and not self._terminal

    def _line(self, end: str) -> None:
        self._last_line_s = time.monotonic()
        rate = (self.done - self._before) / max(self._last_line_s - self._start_s, 1e-9)
        total = "" if self.total is None else f"/{self.total}"
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        text = f"{self.label}: {self.done}{total} {self.unit}, {shown} {self.unit}/s"
        if self.total is not None and self._before < self.done < self.total:
            text += f", {tqdm.format_interval((self.total - self.done) / rate)} left"
        if self._extra is not None:
            text += f", {self._extra()}"
        print(f"{text} {end}".rstrip(), file=sys.stderr, flush=True)
