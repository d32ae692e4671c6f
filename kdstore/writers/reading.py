"""Reading a source again, unit by unit, as it was planned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from kdstore.errors import InputError
from kdstore.sample import Sample
from kdstore.writers.dump import DumpSource
from kdstore.writers.plan import PlannedUnit


def planned_samples(
    source: DumpSource,
    units: Iterable[PlannedUnit],
    *,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[PlannedUnit, list[Sample]]]:
    """Each unit with its samples, from one pass over the source; other rows are not tokenised.

    A unit is asked for once the one before has been taken. Ends early, in the middle of a
    unit, once ``is_over``. Raises InputError if the source no longer gives what was planned.
    """
    waiting = iter(units)
    unit = next(waiting, None)
    if unit is None:
        return
    found: list[Sample] = []
    for row, content in source.rows.rows(unit.first_row):
        if is_over():
            return
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
