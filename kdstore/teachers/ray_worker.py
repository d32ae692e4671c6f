"""A worker of a dump over Ray: one teacher, and the units that it is given.

Two units are in its hands at a time, each in a thread of its own: one is scored while the other is
read, or committed. The teacher has a thread for itself, as engines want it. Ray is not imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import Lock

from kdstore.errors import KDStoreError
from kdstore.filesystem import Folder
from kdstore.layout import commit_path
from kdstore.sample import Sample
from kdstore.teacher import Teacher
from kdstore.teachers.scoring import Scoring, ScoringOptions
from kdstore.writers.dump import DumpSource
from kdstore.writers.pipeline import RunReport
from kdstore.writers.plan import PlannedUnit
from kdstore.writers.reading import planned_samples
from kdstore.writers.scored import ScoredUnit, commit_unit, score_unit
from kdstore.writers.store import StoreWriter
from kdstore.writers.trace import Tracer


class UnitWorker:
    """Opens the store and its source for itself, and loads the teacher when first needed.

    ``directory`` is where the driver runs: relative paths are meant from there, if it exists here.
    """

    def __init__(self, options: ScoringOptions, out: str, directory: str) -> None:
        if Path(directory).is_dir():
            os.chdir(directory)
        self._options, self._folder = options, Folder(out)
        self._tracer = Tracer(self._folder)
        self._reading, self._writing = Lock(), Lock()
        self._scoring_thread = ThreadPoolExecutor(1, thread_name_prefix="kdstore-score")
        self._teacher: Teacher | None = None
        self._idle_since_s: float | None = None

    def dump(self, unit: int) -> RunReport | KDStoreError:
        """Commit a unit, unless it is committed. An error that would come again is given back.

        What is raised is worth another try, for which the teacher is loaded anew.
        """
        try:
            return self._dump(unit)
        except Exception as error:
            self._tracer.failed(unit, error)
            if isinstance(error, KDStoreError):
                return error
            raise

    def close(self) -> None:
        """Stop the teacher, if it is an engine of its own."""
        self._scoring_thread.submit(self._drop_teacher).result()

    def _dump(self, unit: int) -> RunReport:
        report = RunReport(units=1)
        if self._folder.exists(commit_path(unit)):  # by this task, before its worker was killed
            return report
        self._tracer.start(unit)
        with self._reading:
            planned = self._writer.plan.unit(unit)
            with report.timing("read"):
                samples = self._reader.samples(planned)
        scored = self._scoring_thread.submit(self._score, planned, samples, report).result()
        with self._writing, report.timing("write"):
            shard = commit_unit(self._writer, scored).shard
        self._tracer.done(unit)
        report.bytes, report.tokens, report.tokens_scored = shard.bytes, shard.tokens, shard.tokens
        return report

    def _score(self, unit: PlannedUnit, samples: list[Sample], report: RunReport) -> ScoredUnit:
        if self._idle_since_s is not None:
            report.stages["wait"] = time.monotonic() - self._idle_since_s
        if self._teacher is None:
            self._teacher = self._scoring.load_teacher()
        try:
            with report.timing("score"):
                scored = score_unit(self._writer, self._teacher, unit, samples)
        except Exception:
            self._drop_teacher()
            raise
        self._idle_since_s = time.monotonic()
        seconds = {f"{name}_seconds": round(report.stages[name], 3) for name in ("read", "wait")}
        scored.provenance.update(seconds)
        return scored

    def _drop_teacher(self) -> None:
        close = getattr(self._teacher, "close", None)
        self._teacher = self._idle_since_s = None
        if close is not None:
            close()

    @cached_property
    def _scoring(self) -> Scoring:
        return Scoring.of(self._options)

    @cached_property
    def _writer(self) -> StoreWriter:
        return self._scoring.open_store(self._folder, quiet=True)

    @cached_property
    def _reader(self) -> UnitReader:
        return UnitReader(self._scoring.source)


class UnitReader:
    """The samples of units that are asked for one by one.

    Reading goes on where the unit before ended, since files of lines have no other way to a row
    than through those before it; a unit further up starts anew.
    """

    def __init__(self, source: DumpSource) -> None:
        self._source = source
        self._wanted: PlannedUnit
        self._found: Iterator[tuple[PlannedUnit, list[Sample]]] = iter(())
        self._next_row: int | None = None

    def samples(self, unit: PlannedUnit) -> list[Sample]:
        """Raises InputError if the source no longer gives what was planned."""
        if self._next_row is None or unit.first_row < self._next_row:
            self._found = planned_samples(self._source, self._units())
        self._wanted, self._next_row = unit, None  # until it is read
        _, samples = next(self._found)
        self._next_row = unit.last_row
        return samples

    def _units(self) -> Iterator[PlannedUnit]:
        while True:
            yield self._wanted
