"""A small dump whose stages can be held up and made to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdstore.filesystem import Folder
from kdstore.inputs import Row
from kdstore.sample import Sample
from kdstore.teacher import Score, Teacher
from kdstore.teachers.scoring import Scoring, ScoringOptions
from kdstore.writers.dump import DumpSource
from kdstore.writers.pipeline import RunReport
from kdstore.writers.plan import PlannedUnit
from kdstore.writers.run import run_units
from kdstore.writers.store import StoreWriter

WAIT_S = 60  # a wait that takes so long is a hang
Hook = Callable[[int], None]


def nothing(unit: int) -> None:
    """The hook of a stage that nobody disturbs."""


@dataclass(eq=False)
class Work:
    """A planned dump. Hooks are called with a unit's number, before it is read, scored, written.

    ``on_score`` is called before each score of a unit is given. ``read``, ``scored`` and
    ``committed`` say which units have been begun to read, and were scored and committed.
    """

    writer: StoreWriter
    teacher: Teacher
    scoring: Scoring
    on_read: Hook = nothing
    on_score: Hook = nothing
    on_commit: Hook = nothing
    stop_on_signals: bool = True
    read: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)  # units whose scoring has ended, as it may
    num_scores: int = 0

    @classmethod
    def at(cls, folder: Folder, teacher: Path, data: Path, **options: Any) -> Work:
        """The dump of a teacher over data, in units of about 100 tokens."""
        settings: dict[str, Any] = {"unit_tokens": 100, "batch_tokens": 64, **options}
        scoring = Scoring.of(ScoringOptions(path=str(teacher), data=str(data), **settings))
        writer = scoring.open_store(folder, quiet=True)
        return cls(writer, scoring.load_teacher(), scoring)

    @property
    def planned(self) -> list[PlannedUnit]:
        """What is left to do."""
        return [self.writer.plan.unit(unit) for unit in self.writer.pending_units()]

    def unit_of_row(self, row: int) -> int:
        """The unit that a source row belongs to."""
        table = self.writer.plan.table
        return int(table["unit"].to_numpy()[table["source_row"].to_numpy() == row][0])

    def unit_of(self, sample_id: str) -> int:
        """The unit that a sample belongs to."""
        table = self.writer.plan.table
        return int(table["unit"][table["sample_id"].to_pylist().index(sample_id)].as_py())

    def run(self) -> RunReport:
        """Do it, hooks and all."""
        self._hook_writer()
        inner = self.scoring.source
        source = _Source(inner.rows, inner.builder, inner.score, self)
        teacher, options = _Teacher(self), {"quiet": True, "stop_on_signals": self.stop_on_signals}
        return run_units(self.writer, teacher, source, self.planned, **options)

    def run_in_time(self) -> BaseException | None:
        """Do it in another thread; what it raised. Fails if it hangs or leaves threads."""
        raised: list[BaseException] = []

        def run() -> None:
            try:
                self.run()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the dump hangs"
        assert not stage_threads()
        return raised[0] if raised else None

    def _hook_writer(self) -> None:
        commit = StoreWriter.commit

        def hooked(unit: int, *arguments: Any, **options: Any) -> Any:
            self.on_commit(unit)
            done = commit(self.writer, unit, *arguments, **options)
            self.committed.append(unit)
            return done

        self.writer.commit = hooked  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Source(DumpSource):
    work: Work

    def build(self, row: int, content: Row) -> list[Sample]:
        unit = self.work.unit_of_row(row)
        if unit not in self.work.read:
            self.work.read.append(unit)
            self.work.on_read(unit)
        return super().build(row, content)


class _Teacher:
    def __init__(self, work: Work) -> None:
        self.work, self.vocab_size = work, work.teacher.vocab_size

    def provenance(self) -> dict[str, Any]:
        return self.work.teacher.provenance()

    def score(self, samples: Sequence[Sample], *arguments: Any, **options: Any) -> Iterator[Score]:
        unit = self.work.unit_of(samples[0].sample_id)
        try:
            for score in self.work.teacher.score(samples, *arguments, **options):
                self.work.on_score(unit)
                self.work.num_scores += 1
                yield score
            self.work.scored.append(unit)
        finally:
            self.work.closed.append(unit)


def stage_threads() -> list[threading.Thread]:
    """The pipeline's threads that are alive."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("kdstore-")]


def join_stage(stage: str) -> None:
    """Waits until the thread of a stage has ended."""
    for thread in stage_threads():
        if thread.name == f"kdstore-{stage}":
            thread.join(WAIT_S)
            assert not thread.is_alive()
