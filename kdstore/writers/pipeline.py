"""The dump pipeline: while one unit is scored, the next is read and the one before is committed.

Three threads, joined by two lanes. Reading and tokenising have one; scoring has the caller's, since
CUDA contexts and engines belong to a thread; encoding, hashing, uploading and committing have one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread

from kdstore.sample import Sample
from kdstore.teacher import Teacher
from kdstore.writers.dump import DumpSource
from kdstore.writers.lane import Lane
from kdstore.writers.plan import PlannedUnit
from kdstore.writers.reading import planned_samples
from kdstore.writers.scored import ScoredUnit, commit_unit, score_unit
from kdstore.writers.shard import text_chars
from kdstore.writers.stopping import Stopping
from kdstore.writers.trace import Tracer
from kdstore.writers.units import UnitWriter

# In each lane. A unit of the default size has about 1 GB of signals: then one is committed while
# another is scored. Of small units two may wait, so that one slow upload stops nobody.
MAX_LANE_BYTES = 1 << 30
LANE_ITEMS = 2
STOP_S = 2.0  # how long a dump that is stopped at once waits for its threads
SAMPLE_BYTES = 1000  # objects of one sample, beside its tokens and texts
STAGES = ("read", "score", "write", "wait")


@dataclass
class RunReport:
    """What a run has done: units committed, their bytes and tokens, and tokens scored.

    ``stages``: seconds of reading, scoring, writing, and of the teacher waiting for the others, of
    all ``workers`` together.
    """

    units: int = 0
    bytes: int = 0
    tokens: int = 0
    tokens_scored: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    workers: int = 1

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Count the time of the block as a stage's. Each stage is timed by one thread alone."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            self.stages[stage] += time.monotonic() - start_s

    def add(self, other: RunReport) -> None:
        """Count what another worker has done; the seconds in all are one's own."""
        for name in ("units", "bytes", "tokens", "tokens_scored"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, seconds in other.stages.items():
            self.stages[name] += seconds

    def to_dict(self) -> dict[str, float]:
        """Seconds in all and of each stage, and tokens a second."""
        rate = self.tokens_scored / self.seconds if self.seconds else 0.0
        named = {f"{name}_seconds": seconds for name, seconds in self.stages.items()}
        all_of_it = {"seconds": self.seconds, "tokens_per_s": rate, **named}
        return {name: round(value, 3) for name, value in all_of_it.items()}


@dataclass(frozen=True, eq=False)
class _ReadUnit:
    unit: PlannedUnit
    samples: list[Sample]
    seconds: float


class Pipeline:
    """Reads, scores and commits units. The first stage that fails ends it, with its own error.

    In memory are the unit that is scored, one that was read, and as many scored ones as fit into
    ``MAX_LANE_BYTES``: two at most, and one however large.
    """

    def __init__(
        self, writer: UnitWriter, teacher: Teacher, source: DumpSource, *, stopping: Stopping
    ) -> None:
        self.report = RunReport()
        self._writer, self._teacher, self._source = writer, teacher, source
        self._stopping = stopping
        # The unit that is scored is still in its lane.
        self._units: Lane[_ReadUnit] = Lane(max_items=LANE_ITEMS, max_bytes=MAX_LANE_BYTES)
        self._scored: Lane[ScoredUnit] = Lane(max_items=LANE_ITEMS, max_bytes=MAX_LANE_BYTES)
        self._errors: list[BaseException] = []
        self._tracer = Tracer(writer.folder)

    def run(self, planned: Sequence[PlannedUnit], *, on_tokens: Callable[[int], None]) -> None:
        """Commit the units, or those that were begun before a stop was asked for.

        What was scored is committed, whoever failed, unless that is what failed.
        """
        threads = [
            Thread(target=self._read, args=(planned,), name="kdstore-read", daemon=True),
            Thread(target=self._commit, name="kdstore-commit", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            with self._failing():
                self._score(on_tokens)
            self._end(threads, timeout_s=None)
        except KeyboardInterrupt:
            self._scored.shut()
            self._end(threads, timeout_s=STOP_S)
            raise
        if self._errors:
            raise self._errors[0]

    def _end(self, threads: list[Thread], *, timeout_s: float | None) -> None:
        self._units.shut()
        self._scored.close()
        for thread in threads:
            thread.join(timeout_s)
        self._tracer.close()

    def _is_over(self) -> bool:
        return bool(self._errors or self._stopping.asked_by)

    def _read(self, planned: Sequence[PlannedUnit]) -> None:
        found = planned_samples(self._source, planned, is_over=self._is_over)
        with self._failing():
            for unit in planned:
                if not self._units.wait_for_room() or self._is_over():
                    break
                if not self._read_unit(unit, found):
                    break
        self._units.close()

    def _read_unit(
        self, unit: PlannedUnit, found: Iterator[tuple[PlannedUnit, list[Sample]]]
    ) -> bool:
        """Whether there is a unit, and someone who takes it."""
        self._tracer.start(unit.unit)
        before_s = self.report.stages["read"]
        with self._blaming(unit), self.report.timing("read"):
            _, samples = next(found, (unit, None))
        if samples is None:
            return False
        seconds = self.report.stages["read"] - before_s
        tokens = sum(sample.input_ids_T.nbytes + 2 * text_chars(sample) for sample in samples)
        return self._units.put(
            _ReadUnit(unit, samples, seconds), num_bytes=tokens + SAMPLE_BYTES * len(samples)
        )

    def _score(self, on_tokens: Callable[[int], None]) -> None:
        def count(tokens: int) -> None:
            self.report.tokens_scored += tokens
            on_tokens(tokens)
            if self._errors:
                raise self._errors[0]

        units, going_on = iter(self._units), True
        while going_on:
            before_s = self.report.stages["wait"]
            with self.report.timing("wait"):
                read = next(units, None)
            if read is None or self._is_over():
                return
            with self._blaming(read.unit), self.report.timing("score"):
                scored = score_unit(
                    self._writer, self._teacher, read.unit, read.samples, on_tokens=count
                )
            waited_s = self.report.stages["wait"] - before_s
            scored.provenance.update(
                read_seconds=round(read.seconds, 3), wait_seconds=round(waited_s, 3)
            )
            del read
            with self.report.timing("wait"):
                going_on = self._scored.put(scored, num_bytes=scored.num_bytes)
            del scored

    def _commit(self) -> None:
        with self._failing():
            for scored in self._scored:
                with self._blaming(scored.unit), self.report.timing("write"):
                    shard = commit_unit(self._writer, scored).shard
                self._tracer.done(scored.unit.unit)
                del scored
                self.report.units += 1
                self.report.bytes += shard.bytes
                self.report.tokens += shard.tokens
        self._scored.shut()

    @contextmanager
    def _blaming(self, unit: PlannedUnit) -> Iterator[None]:
        """As ``_failing``, but raises; the unit's record says what failed first."""
        try:
            yield
        except Exception as error:
            if not self._errors:
                self._fail(error)
                self._tracer.failed(unit.unit, error)
            raise

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Ends a stage, and with it the others, by its error."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._units.shut()
