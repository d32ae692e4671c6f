"""The dump pipeline: units of samples to signals, to shards, to commits.

Batches never cross a unit, a unit never depends on another, and every draw is keyed by its sample
and position: so a dump that was killed and run again gives the store that an undisturbed one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import kdstore
from kdstore.audit import AUDIT_SELECTION, audit_runs
from kdstore.errors import InputError, TeacherError
from kdstore.layout import MAIN_SIGNAL
from kdstore.progress import Progress
from kdstore.sample import Sample
from kdstore.select import Selection, parse_selection
from kdstore.signal import SparseSignal
from kdstore.teacher import Score, Teacher
from kdstore.writers.dump import DumpSource
from kdstore.writers.plan import PlannedUnit
from kdstore.writers.units import UnitWriter


def run_units(
    writer: UnitWriter,
    teacher: Teacher,
    source: DumpSource,
    planned: Sequence[PlannedUnit],
    *,
    label: str = "dump",
    quiet: bool = False,
) -> None:
    """Score and commit the planned units, in order; the source is read once.

    ``label`` is that of the progress. Raises InputError if the source no longer gives what was
    planned, TeacherError if the teacher leaves a sample unanswered.
    """
    total = sum(sum(unit.num_tokens) for unit in planned)
    with Progress(label, total=total, unit="tokens", quiet=quiet) as progress:
        for unit, samples in planned_samples(source, planned):
            _run_unit(writer, teacher, unit, samples, on_tokens=progress.advance)


def planned_samples(
    source: DumpSource, units: Sequence[PlannedUnit]
) -> Iterator[tuple[PlannedUnit, list[Sample]]]:
    """Each unit with its samples, from one pass over the source; other rows are not tokenised."""
    if not units:
        return
    waiting = iter(units)
    unit = next(waiting)
    found: list[Sample] = []
    for row, content in source.rows.rows(unit.first_row):
        if row < unit.first_row:
            continue
        found.extend(source.build(row, content))
        if row + 1 == unit.last_row:
            _check_as_planned(unit, found, source.rows.location)
            yield unit, found
            found = []
            following = next(waiting, None)
            if following is None:
                return
            unit = following
    _check_as_planned(unit, found, source.rows.location)


def _run_unit(
    writer: UnitWriter,
    teacher: Teacher,
    unit: PlannedUnit,
    samples: list[Sample],
    *,
    on_tokens: Callable[[int], None],
) -> None:
    started_s = time.monotonic()
    codec = writer.shards.codecs[MAIN_SIGNAL]
    selection = parse_selection(codec.selection)
    seed, fraction = int(writer.header.identity["seed"]), writer.header.audit_fraction
    lengths = dict(unit.ids_and_lengths)
    scores: dict[str, Score] = {}
    for score in teacher.score(
        samples,
        selection,
        scalars=codec.scalars,
        seed=seed,
        draw=writer.shards.draw,
        audit_fraction=fraction,
    ):
        scores[score.sample_id] = score
        on_tokens(lengths.pop(score.sample_id, 0))
    scored = [with_signal(sample, scores, selection, codec.scalars) for sample in samples]
    if fraction:
        scored = [_with_audit(s, scores, fraction=fraction, seed=seed) for s in scored]
    provenance = {
        "kdstore": kdstore.__version__,
        "seconds": round(time.monotonic() - started_s, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **teacher.provenance(),
    }
    statistics = signal_statistics(scored) if codec.entry_planes else {}
    writer.commit(unit.unit, scored, statistics=statistics, provenance=provenance)
    on_tokens(sum(lengths.values()))  # of samples without scored positions


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


def _check_as_planned(unit: PlannedUnit, samples: Sequence[Sample], where: str) -> None:
    planned = unit.ids_and_lengths
    found = [(sample.sample_id, sample.num_tokens) for sample in samples]
    if planned != found:
        pairs = zip([*planned, None], [*found, None], strict=False)
        expected, got = next((a, b) for a, b in pairs if a != b)
        raise InputError(
            "the source no longer gives the samples that were planned",
            where=f"{where}, unit {unit.unit}",
            expected=f"(id, tokens) = {expected}",
            got=got,
            todo="restore the source as it was, or dump into a new folder",
        )
