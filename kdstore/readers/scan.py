"""``kdstore.scan``: a store as a polars LazyFrame, one row per sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import ArrayLike
from polars.io.plugins import register_io_source

from kdstore.codecs.rows import PLAIN_COLUMNS
from kdstore.errors import UsageError
from kdstore.readers.cache import READ_AHEAD
from kdstore.readers.opening import open
from kdstore.readers.predicate import Bounds, Condition, conditions_of
from kdstore.readers.shard import ShardReader
from kdstore.readers.store import Store
from kdstore.signal import SparseSignal

_PLACE = {"index": pl.Int64(), "unit": pl.Int64()}
_STATISTICS = {
    "entries": pl.Int64(),
    "mean_label_logprob": pl.Float64(),
    "mean_entropy": pl.Float64(),
    "kept_mass": pl.Float64(),
}


def scan(source: Store | str | Path, **storage_options: Any) -> pl.LazyFrame:
    """A LazyFrame of the committed samples of a store, one row each, in their order.

    Columns: ``index`` (its number in the store) and ``unit``, int64; the plain columns of the
    store's shards as they are (``messages`` and ``metadata`` are JSON); and of each sample's signal

    * ``entries`` int64: number of entries, over all positions
    * ``mean_label_logprob``, ``mean_entropy`` float64, in nats: means of the scalars over the
      signal's positions; null where there are none, or no such scalar
    * ``kept_mass`` float64: mean probability that the entries of a position carry; null likewise

    Only what a query needs is read: columns; row groups, as far as comparisons of ``index``,
    ``unit``, ``sample_id``, ``num_tokens`` or ``num_scored`` with values say which; and further
    columns where all cheaper conditions of a filter left a row. Signals are decoded for these rows
    and only if a statistic is asked for. ``head`` stops early; after a filter it does with
    ``collect(engine="streaming")``.

    Sizes of shards, their footers and the checksums of what is read of plain columns are checked,
    and rows whose signals are decoded as in ``store[i]``: CorruptShardError on damage. Row hashes
    are not checked unless a signal is decoded. Raises as ``kdstore.open``, whose options it takes;
    an opened store may be given instead, whose signal and overlays are then read.

    >>> import kdstore
    >>> long = kdstore.scan("STORE").filter(pl.col("num_tokens") > 4000)  # doctest: +SKIP
    >>> long.select("sample_id", "mean_entropy").collect()  # doctest: +SKIP
    """
    store = opened(source, storage_options)

    def frames(
        names: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, _: int | None
    ) -> Iterator[pl.DataFrame]:
        wanted = list(schema) if names is None else names
        # Threads of polars query side by side, and its streaming engine reads on after an answer.
        return _frames(store.reopened(), wanted, _by_cost(predicate), n_rows)

    schema = _schema(store)
    return register_io_source(frames, schema=schema)


def opened(source: Store | str | Path, storage_options: dict[str, Any]) -> Store:
    """The store at a path or URL, or the one given; UsageError for options of an opened one."""
    if not isinstance(source, Store):
        return open(source, **storage_options)
    if storage_options:
        raise UsageError(
            "an opened store takes no storage options",
            where=source.folder.url,
            got=", ".join(storage_options),
            todo="give them to kdstore.open",
        )
    return source


def _schema(store: Store) -> dict[str, pl.DataType]:
    names = store.header.identity["columns"]
    plain = pa.schema([(name, PLAIN_COLUMNS[name]) for name in names]).empty_table()
    return {**_PLACE, **pl.DataFrame(plain).schema, **_STATISTICS}


def _by_cost(predicate: pl.Expr | None) -> list[Condition]:
    """A predicate's conditions, those first that read nothing, those last that decode signals."""
    conditions = [] if predicate is None else conditions_of(predicate)

    def cost(condition: Condition) -> int:
        if condition.columns & _STATISTICS.keys():
            return 2
        return 0 if condition.columns <= _PLACE.keys() else 1

    return sorted(conditions, key=cost)


def _frames(
    store: Store, names: Sequence[str], conditions: list[Condition], n_rows: int | None
) -> Iterator[pl.DataFrame]:
    """What is left of each row group. polars means the first ``n_rows`` before any filter."""
    limit = len(store) if n_rows is None else n_rows
    for shard_index, (first, end) in enumerate(pairwise(store.first_rows.tolist())):
        unit = int(store.commits.units[shard_index])
        if first >= limit or not _possible(conditions, _place_bounds(unit, first, end)):
            continue
        shard = store.shard(shard_index)
        for group, (start, after) in enumerate(pairwise((first + shard.first_rows).tolist())):
            bounds = {**_place_bounds(unit, start, after), **shard.bounds(group)}
            if start < limit and _possible(conditions, bounds):
                rows = _Rows(store, shard, group, unit, range(start, after))
                rows.keep(limit, conditions)
                if len(rows):
                    yield rows.columns(names)


class _Rows:
    """Rows of a row group, which become fewer, and what has been read of them."""

    def __init__(
        self, store: Store, shard: ShardReader, group: int, unit: int, indices: range
    ) -> None:
        self._store, self._shard, self._group, self._first = store, shard, group, indices.start
        columns = {"index": indices, "unit": [unit] * len(indices)}
        self._frame = pl.DataFrame(columns, schema=_PLACE)

    def __len__(self) -> int:
        return len(self._frame)

    def keep(self, limit: int, conditions: Iterable[Condition]) -> None:
        """Drop the rows from ``limit`` on, and those that do not fulfil every condition."""
        self._frame = self._frame.head(limit - self._first)
        for condition in conditions:
            if self._frame.is_empty():
                return
            self._read(condition.columns)
            self._frame = self._frame.filter(condition.expr)

    def columns(self, names: Sequence[str]) -> pl.DataFrame:
        """These columns of the rows that are left."""
        self._read(names)
        return self._frame.select(names)

    def _read(self, names: Iterable[str]) -> None:
        missing = [name for name in names if name not in self._frame.columns]
        plain = [name for name in missing if name in PLAIN_COLUMNS]
        if plain:
            table = pl.DataFrame(self._shard.plain(self._group, plain))
            self._frame = self._frame.hstack(table[self._frame["index"] - self._first])
        if len(plain) < len(missing):
            self._frame = self._frame.hstack(_statistics(self._store, self._frame["index"]))


def _place_bounds(unit: int, first: int, end: int) -> dict[str, tuple[int, int]]:
    return {"unit": (unit, unit), "index": (first, end - 1)}


def _possible(conditions: Iterable[Condition], bounds: Bounds) -> bool:
    return all(condition.may_match(bounds) for condition in conditions)


def _statistics(store: Store, indices: pl.Series) -> pl.DataFrame:
    numbers, rows = indices.to_list(), []
    for start in range(0, len(numbers), READ_AHEAD):
        samples = store.__getitems__(numbers[start : start + READ_AHEAD])
        rows += [_statistics_of(sample.signal) for sample in samples if sample.signal is not None]
    return pl.DataFrame(rows, schema=_STATISTICS, orient="row")


def _statistics_of(signal: SparseSignal) -> tuple[int, float | None, float | None, float | None]:
    return (
        signal.num_entries,
        _mean(signal.scalars.get("label_logprob", ())),
        _mean(signal.scalars.get("entropy", ())),
        _mean(signal.kept_mass_S),
    )


def _mean(values: ArrayLike) -> float | None:
    values_S = np.asarray(values, dtype=np.float64)
    return float(values_S.mean()) if len(values_S) else None
