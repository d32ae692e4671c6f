"""One unit of a dump: scored by a teacher, then encoded and committed.

A unit never depends on another, and every draw is keyed by its sample and position: so a dump that
was killed and run again gives the store that an undisturbed one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import kdstore
from kdstore.audit import AUDIT_SELECTION, audit_runs
from kdstore.commit import Commit
from kdstore.errors import TeacherError
from kdstore.layout import MAIN_SIGNAL
from kdstore.sample import Sample
from kdstore.select import Selection, parse_selection
from kdstore.signal import SparseSignal
from kdstore.teacher import Score, Teacher
from kdstore.writers.plan import PlannedUnit
from kdstore.writers.units import UnitWriter


@dataclass(frozen=True, eq=False)
class ScoredUnit:
    """The samples of a unit and what the teacher said of them, by sample id."""

    unit: PlannedUnit
    samples: list[Sample]
    scores: dict[str, Score]
    provenance: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of the signals."""
        return sum(score.signal.nbytes + score.audit.nbytes for score in self.scores.values())


def dump_unit(
    writer: UnitWriter, teacher: Teacher, unit: PlannedUnit, samples: list[Sample]
) -> Commit:
    """The commit of one unit, after scoring its samples; raises what teacher and writer raise."""
    return commit_unit(writer, score_unit(writer, teacher, unit, samples))


def score_unit(
    writer: UnitWriter,
    teacher: Teacher,
    unit: PlannedUnit,
    samples: list[Sample],
    *,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> ScoredUnit:
    """What the teacher says of a unit's samples. ``on_tokens`` is called after each one."""
    started_s = time.monotonic()
    codec = writer.shards.codecs[MAIN_SIGNAL]
    lengths = dict(unit.ids_and_lengths)
    answers = teacher.score(
        samples,
        parse_selection(codec.selection),
        scalars=codec.scalars,
        seed=int(writer.header.identity["seed"]),
        draw=writer.shards.draw,
        audit_fraction=writer.header.audit_fraction,
    )
    scores: dict[str, Score] = {}
    try:
        for score in answers:
            scores[score.sample_id] = score
            on_tokens(lengths.pop(score.sample_id, 0))
    finally:
        if isinstance(answers, Generator):  # an engine drops what is in flight now, not when
            answers.close()  # the error that ends it is forgotten
    on_tokens(sum(lengths.values()))  # of samples without scored positions
    provenance = {
        "kdstore": kdstore.__version__,
        "seconds": round(time.monotonic() - started_s, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **teacher.provenance(),
    }
    return ScoredUnit(unit, samples, scores, provenance)


def commit_unit(writer: UnitWriter, unit: ScoredUnit) -> Commit:
    """The commit of a scored unit; TeacherError if a sample was left unanswered."""
    codec = writer.shards.codecs[MAIN_SIGNAL]
    selection, fraction = parse_selection(codec.selection), writer.header.audit_fraction
    scored = [with_signal(s, unit.scores, selection, codec.scalars) for s in unit.samples]
    if fraction:
        seed = int(writer.header.identity["seed"])
        scored = [_with_audit(s, unit.scores, fraction=fraction, seed=seed) for s in scored]
    statistics = signal_statistics(scored) if codec.entry_planes else {}
    return writer.commit(unit.unit.unit, scored, statistics=statistics, provenance=unit.provenance)


def signal_statistics(samples: Sequence[Sample]) -> dict[str, Any]:
    """Sums over the scored positions of samples, as the teacher gave them, before any rounding.

    Of the scalars ``label_logprob`` and ``entropy``, where they are stored, finite values only.
    """
    signals = [sample.signal for sample in samples if sample.signal is not None]
    sums = {
        name: float(
            sum(np.sum(s.scalars[name], where=np.isfinite(s.scalars[name])) for s in signals)
        )
        for name in ("label_logprob", "entropy")
        if all(name in signal.scalars for signal in signals)
    }
    return {
        "entries": sum(signal.num_entries for signal in signals),
        "kept_mass": float(sum(signal.kept_mass_S.sum() for signal in signals)),
        "scalar_sums": sums,
        "audited": sum(sample.audit.num_scored for sample in samples if sample.audit),
    }


def with_signal(
    sample: Sample,
    scores: dict[str, Score],
    selection: Selection,
    scalars: Sequence[str],
) -> Sample:
    """The sample with its score's signal; TeacherError if it should have one and has none."""
    score = scores.get(sample.sample_id)
    if score is not None:
        return replace(sample, signal=score.signal)
    if sample.num_scored:
        raise TeacherError(
            "the teacher left a sample unanswered",
            where=f"sample {sample.sample_id!r}",
            expected=f"a signal of {sample.num_scored} positions",
            got="nothing",
        )
    empty = {name: np.zeros(0, np.float32) for name in scalars}
    return replace(sample, signal=replace(SparseSignal.empty(selection.spec), scalars=empty))


def _with_audit(sample: Sample, scores: dict[str, Score], *, fraction: float, seed: int) -> Sample:
    score = scores.get(sample.sample_id)
    signal = SparseSignal.empty(AUDIT_SELECTION) if score is None else score.audit
    runs = audit_runs(sample, fraction=fraction, seed=seed)
    return replace(sample, audit=replace(sample, runs=runs, signal=signal))
