"""Doing a dump: the entry, its signals and its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

from kdstore.errors import StoppedError
from kdstore.progress import Progress
from kdstore.teacher import Teacher
from kdstore.writers.dump import DumpSource
from kdstore.writers.pipeline import STAGES, Pipeline, RunReport
from kdstore.writers.plan import PlannedUnit
from kdstore.writers.stopping import Stopping, stopping_on_signals
from kdstore.writers.units import UnitWriter


class Engine(Protocol):
    """What commits planned units, and reports what it has done so far."""

    report: RunReport

    def run(self, planned: Sequence[PlannedUnit], *, on_tokens: Callable[[int], None]) -> None:
        """Commit the units, or those that were begun before a stop was asked for."""
        ...


def run_units(
    writer: UnitWriter,
    teacher: Teacher,
    source: DumpSource,
    planned: Sequence[PlannedUnit],
    *,
    label: str = "dump",
    quiet: bool = False,
    stop_on_signals: bool = False,
) -> RunReport:
    """Score and commit the planned units; the source is read once, the teacher asked from here.

    ``label`` is that of the progress. With ``stop_on_signals`` the first SIGTERM or SIGINT lets it
    finish the units in work: StoppedError, if any are left. Raises InputError if the source no
    longer gives what was planned, TeacherError if the teacher leaves a sample unanswered, and
    whatever a stage raises.
    """
    return run_engine(
        lambda stopping: Pipeline(writer, teacher, source, stopping=stopping),
        planned,
        label=label,
        quiet=quiet,
        stop_on_signals=stop_on_signals,
    )


def run_engine(
    make_engine: Callable[[Stopping], Engine],
    planned: Sequence[PlannedUnit],
    *,
    label: str = "dump",
    quiet: bool = False,
    stop_on_signals: bool = False,
) -> RunReport:
    """As ``run_units``, by what commits the units."""
    start_s = time.monotonic()
    with (
        stopping_on_signals(quiet=quiet) if stop_on_signals else nullcontext(Stopping()) as stopping
    ):
        engine = make_engine(stopping)
        report = engine.report
        with Progress(
            label,
            total=sum(unit.num_tokens for unit in planned),
            unit="tokens",
            quiet=quiet,
            extra=lambda: _stages(report, seconds=time.monotonic() - start_s),
        ) as progress:
            try:
                engine.run(planned, on_tokens=progress.advance)
            finally:
                report.seconds = time.monotonic() - start_s
            if report.units < len(planned):
                raise StoppedError(
                    f"stopped by {stopping.asked_by} with {report.units} of {len(planned)} units "
                    "committed; run the same command again to go on"
                )
    return report


def _stages(report: RunReport, *, seconds: float) -> str:
    """Bytes a token so far, and each stage's share of the workers' time; stages overlap."""
    all_s = max(seconds, 1e-9) * report.workers
    shares = [f"{name} {report.stages[name] / all_s:.0%}" for name in STAGES]
    size = [f"{report.bytes / report.tokens:.1f} bytes/token"] if report.tokens else []
    return ", ".join([*size, *shares])
