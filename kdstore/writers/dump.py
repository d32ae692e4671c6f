"""The dump pipeline: source rows to samples, to signals, to committed units.

Batches never cross a unit, a unit never depends on another, and every draw is keyed by its sample
and position: so a dump that was killed and run again gives the store that an undisturbed one does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import kdstore
from kdstore.align import TokenTable, tokenizer_digest, tokenizer_files
from kdstore.codecs.registry import codec_name_for
from kdstore.codecs.rows import PLAIN_COLUMNS
from kdstore.errors import InputError, TeacherError
from kdstore.filesystem import Folder
from kdstore.inputs import SampleBuilder, Source
from kdstore.layout import MAIN_SIGNAL
from kdstore.progress import Progress
from kdstore.sample import Sample, ScoreRule
from kdstore.select import DEFAULT_SCALARS, DEFAULT_SELECTION, Selection, parse_selection
from kdstore.signal import SparseSignal
from kdstore.teacher import Teacher
from kdstore.writers.plan import PlannedUnit, make_plan
from kdstore.writers.store import NewPlan, StoreWriter

DEFAULT_UNIT_TOKENS = 1 << 22
CONFIG_FILE = "tokenizer_config.json"
_TEXT_COLUMNS = ("text", "messages")


@dataclass(frozen=True)
class DumpConfig:
    """What is stored: selection and scalars, where, and how the work is cut.

    ``unit_tokens`` is the least number of tokens of a unit but the last; a unit is what a crash can
    lose, and one shard.
    """

    selection: str = DEFAULT_SELECTION
    scalars: tuple[str, ...] = DEFAULT_SCALARS
    score: ScoreRule = "supervised"
    unit_tokens: int = DEFAULT_UNIT_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class DumpSource:
    """Where samples come from: rows, and how they become tokens."""

    rows: Source
    builder: SampleBuilder
    score: ScoreRule

    def samples(self, start: int = 0) -> Iterator[tuple[int, list[Sample]]]:
        """(source row, its samples) from a row on."""
        for row, content in self.rows.rows(start):
            samples = self.builder.samples(row, content)
            yield row, [sample.with_score_rule(self.score) for sample in samples]


def open_dump(
    folder: Folder,
    source: DumpSource,
    *,
    teacher: dict[str, Any],
    vocab_size: int,
    tokenizer: Any,
    config: DumpConfig,
    quiet: bool = False,
) -> StoreWriter:
    """The store of a dump, planned if it is new, resumed if it exists.

    ``teacher`` is the teacher's part of the identity, ``vocab_size`` the width of its logits.
    Raises InputError, StoreMismatchError, UsageError and HeaderError, as planning and resuming do.
    """
    identity = build_identity(source, teacher, vocab_size, tokenizer, config)

    def plan() -> NewPlan:
        with Progress("plan", total=None, unit="rows", quiet=quiet) as progress:
            made = make_plan(
                source.samples(),
                unit_tokens=config.unit_tokens,
                vocab_size=vocab_size,
                where=source.rows.location,
                on_row=progress.advance,
            )
        return NewPlan(*made, source.builder.counters.to_dict())

    files = {**tokenizer_files(tokenizer), CONFIG_FILE: tokenizer_config(tokenizer)}
    return StoreWriter.open(folder, identity, make_plan=plan, tokenizer_files=files)


def tokenizer_config(tokenizer: Any) -> bytes:
    """``tokenizer_config.json`` as save_pretrained writes it: what loading the tokenizer needs."""
    with tempfile.TemporaryDirectory(prefix="kdstore-") as folder:
        tokenizer.save_pretrained(folder)
        return (Path(folder) / CONFIG_FILE).read_bytes()


def build_identity(
    source: DumpSource,
    teacher: dict[str, Any],
    vocab_size: int,
    tokenizer: Any,
    config: DumpConfig,
) -> dict[str, Any]:
    """What the signals of a dump are, without the digests of plan and id order."""
    selection = parse_selection(config.selection)
    signal = {
        "selection": selection.spec,
        "codec": codec_name_for(selection.spec),
        "scalars": list(config.scalars),
        "scored": config.score,
    }
    keep_text = source.builder.config.keep_text
    return {
        "teacher": teacher,
        "vocab_size": vocab_size,
        "vocab_digest": TokenTable.from_tokenizer(tokenizer).fingerprint(),
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "tokenization": source.builder.policy(),
        "input": source.builder.config.to_dict(),
        "signals": {MAIN_SIGNAL: signal},
        "source": source.rows.fingerprint(),
        "unit_tokens": config.unit_tokens,
        "columns": [name for name in PLAIN_COLUMNS if keep_text or name not in _TEXT_COLUMNS],
        "seed": config.seed,
    }


def run_units(
    writer: StoreWriter,
    teacher: Teacher,
    source: DumpSource,
    units: Sequence[int],
    *,
    quiet: bool = False,
) -> None:
    """Score and commit the given units, in order; the source is read once.

    Raises InputError if the source no longer gives what was planned, TeacherError if the teacher
    leaves a sample unanswered.
    """
    planned = [writer.plan.unit(unit) for unit in units]
    total = sum(sum(unit.num_tokens) for unit in planned)
    with Progress("dump", total=total, unit="tokens", quiet=quiet) as progress:
        for unit, samples in planned_samples(source, planned):
            _run_unit(writer, teacher, unit, samples)
            progress.advance(sum(unit.num_tokens))


def planned_samples(
    source: DumpSource, units: Sequence[PlannedUnit]
) -> Iterator[tuple[PlannedUnit, list[Sample]]]:
    """Each unit with its samples, from one pass over the source."""
    if not units:
        return
    rows = source.samples(units[0].first_row)
    row, samples = next(rows, (-1, []))
    for unit in units:
        found: list[Sample] = []
        while 0 <= row < unit.last_row:
            if row >= unit.first_row:
                found.extend(samples)
            row, samples = next(rows, (-1, []))
        _check_as_planned(unit, found, source.rows.location)
        yield unit, found


def _run_unit(
    writer: StoreWriter, teacher: Teacher, unit: PlannedUnit, samples: list[Sample]
) -> None:
    started_s = time.monotonic()
    codec = writer.shards.codec
    selection = parse_selection(codec.selection)
    seed = int(writer.header.identity["seed"])
    signals = dict(teacher.score(samples, selection, scalars=codec.scalars, seed=seed))
    scored = [_with_signal(sample, signals, selection, codec.scalars) for sample in samples]
    provenance = {
        "kdstore": kdstore.__version__,
        "seconds": round(time.monotonic() - started_s, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **teacher.provenance(),
    }
    writer.commit(unit.unit, scored, statistics=signal_statistics(scored), provenance=provenance)


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
    }


def _with_signal(
    sample: Sample,
    signals: dict[str, SparseSignal],
    selection: Selection,
    scalars: Sequence[str],
) -> Sample:
    signal = signals.get(sample.sample_id)
    if signal is None and not sample.num_scored:
        empty = {name: np.zeros(0, np.float32) for name in scalars}
        signal = replace(SparseSignal.empty(selection.spec), scalars=empty)
    if signal is None:
        raise TeacherError(
            "the teacher left a sample unanswered",
            where=f"sample {sample.sample_id!r}",
            expected=f"a signal of {sample.num_scored} positions",
            got="nothing",
        )
    return replace(sample, signal=signal)


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
