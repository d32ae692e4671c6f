"""Where an online teacher's signals come from: asked for each time, or once and then stored."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import copy as shallow_copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import patch_environment
from transformers.integrations import is_deepspeed_zero3_enabled

import kdstore
from kdstore.errors import UsageError
from kdstore.filesystem import Folder
from kdstore.readers.columns import ENTRIES, Columns
from kdstore.readers.store import Store
from kdstore.sample import Sample
from kdstore.select import parse_selection
from kdstore.signal import NO_ENTRIES, SparseSignal
from kdstore.teacher import Teacher
from kdstore.teachers.scoring import Scoring
from kdstore.train.tokenfile import TokenFile
from kdstore.writers.dump import DumpSource
from kdstore.writers.plan import Plan
from kdstore.writers.run import run_units
from kdstore.writers.scored import with_signal

Place = tuple[int, int, int]  # unit, row of all samples, draw


class Answers(Protocol):
    """Scored samples of a plan. ``store`` has its header and tokenizer, and what is committed."""

    plan: Plan
    store: Store
    num_draws: int

    def samples(self, places: Sequence[Place]) -> list[Sample]:
        """The samples of some places, in the order asked for, with their signals."""
        ...

    def with_columns(self, columns: Sequence[str]) -> Answers:
        """The same, of which only some columns are there; see ``Samples.with_columns``."""
        ...

    def prefetch(self, places: Sequence[Place]) -> None:
        """Begin to read in the background what can be read."""
        ...


class LazyTeacher:
    """A teacher that is loaded when it is first asked, and once more after ``release``."""

    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring
        self._model: Teacher | None = None

    def __call__(self) -> Teacher:
        """The teacher; UsageError where DeepSpeed would cut it up."""
        if self._model is None:
            _check_whole()
            devices = range(torch.cuda.device_count())
            # A resumed run loads it at another step, which must not change what dropout draws.
            with (
                torch.random.fork_rng(devices=devices),
                # Else FSDP has transformers load no weights on ranks but the first.
                patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"),
            ):
                self._model = self._scoring.load_teacher()
        return self._model

    def release(self) -> bool:
        """Free its memory; whether there was any to free."""
        model, self._model = self._model, None
        if model is not None:
            model.close()
        return model is not None


class Fresh:
    """Asks the teacher each time, of all samples at once; token ids lie in a temporary file.

    Draw r of a sampled selection is its r-th, and there is no end of draws.
    """

    def __init__(self, scoring: Scoring, teacher: LazyTeacher, *, quiet: bool) -> None:
        self._tokens, self._teacher = TokenFile(), teacher
        source = _KeptSource(**vars(scoring.source), tokens=self._tokens)
        folder = Folder(self._tokens.folder / "store")
        self.plan = scoring.open_store(folder, source=source, quiet=quiet).plan
        self._tokens.finish()
        self.store = Store(folder)
        self._config = scoring.config
        self._selection = parse_selection(self._config.selection)
        self._columns: Columns | None = None
        self.num_draws = sys.maxsize if self._selection.sampled else 1

    def samples(self, places: Sequence[Place]) -> list[Sample]:
        """The samples of some places, in the order asked for, with their signals."""
        found: dict[tuple[int, int], Sample] = {}
        for draw in dict.fromkeys(draw for _, _, draw in places):
            rows = list(dict.fromkeys(row for _, row, other in places if other == draw))
            samples = self._scored(rows, draw)
            found.update(zip(((row, draw) for row in rows), samples, strict=True))
        return [replace(found[row, draw]) for _, row, draw in places]

    def _scored(self, rows: list[int], draw: int) -> list[Sample]:
        scalars: Sequence[str] = self._config.scalars
        if self._columns is not None:
            scalars = self._columns.of(scalars)
        samples = self._tokens.samples(rows, score=self._config.score)
        answers = self._teacher().score(
            samples, self._selection, scalars=scalars, seed=self._config.seed, draw=draw
        )
        scores = {score.sample_id: score for score in answers}
        scored = [with_signal(sample, scores, self._selection, scalars) for sample in samples]
        columns = self._columns
        return scored if columns is None else [_reduced(sample, columns) for sample in scored]

    def with_columns(self, columns: Sequence[str]) -> Fresh:
        """The same, of which only some columns are there; see ``Samples.with_columns``."""
        other = shallow_copy(self)
        other._columns = Columns(frozenset(columns))
        plain = self.store.header.identity["columns"]
        other._columns.expect({*plain, *self._config.scalars}, where=self.store.folder.url)
        return other

    def prefetch(self, places: Sequence[Place]) -> None:
        """Nothing: the teacher is in this process."""


class Recording:
    """Asks the teacher once, a unit at a time when one of its samples is first asked for.

    The unit is committed as by a dump, and read from the store, so that a student sees what is
    stored. The teacher is released once all units are committed. What other processes have
    committed is not asked again; where two score a unit at once, the first commit stands, and
    neither waits for the other.
    """

    num_draws = 1

    def __init__(
        self, scoring: Scoring, teacher: LazyTeacher, *, url: str, quiet: bool, **cache: Any
    ) -> None:
        self._source, self._teacher, self._quiet = scoring.source, teacher, quiet
        self._writer = scoring.open_store(Folder(url), quiet=quiet)
        self.plan = self._writer.plan
        self.store = kdstore.open(url, **cache)
        units = self.plan.table["unit"].to_numpy()
        self._first_rows = np.searchsorted(units, np.arange(self.plan.num_units))

    def samples(self, places: Sequence[Place]) -> list[Sample]:
        """The samples of some places, in the order asked for, read from the store."""
        self._record(list(dict.fromkeys(unit for unit, _, _ in places)))
        return self.store.__getitems__(self._stored(places))

    def with_columns(self, columns: Sequence[str]) -> Recording:
        """The same, of which only some columns are there; see ``Samples.with_columns``."""
        other = shallow_copy(self)
        other.store = self.store.with_columns(columns)
        return other

    def prefetch(self, places: Sequence[Place]) -> None:
        """Begin to read those that are stored."""
        missing = set(self._missing([unit for unit, _, _ in places]))
        self.store.prefetch(self._stored([place for place in places if place[0] not in missing]))

    def _record(self, units: Sequence[int]) -> None:
        """Score and commit those of some units that nobody has committed yet."""
        if not self._missing(units):
            return
        self.store.refresh()  # another rank may have been here
        for unit in self._missing(units):
            planned = [self.plan.unit(unit)]
            run_units(
                self._writer,
                self._teacher(),
                self._source,
                planned,
                label="record",
                quiet=self._quiet,
            )
            self.store.refresh()
        if self.store.is_complete:
            self._writer.seal()
            if self._teacher.release() and not self._quiet:
                url = self.store.folder.url
                print(f"kdstore: {url} is complete, the teacher is released", file=sys.stderr)

    def _missing(self, units: Sequence[int]) -> list[int]:
        is_there = np.isin(units, self.store.commits.units)
        return [unit for unit, there in zip(units, is_there, strict=True) if not there]

    def _stored(self, places: Sequence[Place]) -> list[int]:
        """Where samples of committed units are in the store as it is now."""
        units, rows = (np.array([place[n] for place in places], np.int64) for n in (0, 1))
        shards = np.searchsorted(self.store.commits.units, units)
        stored = self.store.first_rows[shards] + rows - self._first_rows[units]
        return stored.tolist()  # type: ignore[no-any-return]


def _check_whole() -> None:
    if is_deepspeed_zero3_enabled():
        raise UsageError(
            "ZeRO-3 would cut up the teacher's weights with the student's",
            where="training.deepspeed",
            expected="ZeRO-1, ZeRO-2 or FSDP with an online teacher",
            got="ZeRO-3",
            todo="dump a store first and train on that, or change the stage",
        )


@dataclass(frozen=True)
class _KeptSource(DumpSource):
    """A source whose samples are kept while a plan is made of them."""

    tokens: TokenFile

    def samples(self) -> Any:
        """(source row, its samples) of all rows."""
        for row, samples in super().samples():
            self.tokens.add(samples)
            yield row, samples


def _reduced(sample: Sample, columns: Columns) -> Sample:
    """The sample as a store gives it of which only some columns are read."""
    signal, names = sample.signal, columns.names
    if signal is not None and ENTRIES not in names:
        indptr = np.zeros(len(signal) + 1)
        signal = SparseSignal.from_arrays(NO_ENTRIES, indptr, [], [], scalars=signal.scalars)
    return replace(
        sample,
        signal=signal,
        spans=sample.spans if "spans" in names else (),
        text=sample.text if "text" in names else None,
        messages=sample.messages if "messages" in names else None,
        metadata=sample.metadata if "metadata" in names else None,
    )
