"""``kdstore.explode``: chosen samples as a polars DataFrame, one row per entry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kdstore.align import TokenTable
from kdstore.errors import UsageError
from kdstore.readers.scan import opened
from kdstore.readers.store import Store
from kdstore.sample import Sample
from kdstore.signal import SparseSignal

_OWN = {"pps": ("tail", pl.Boolean()), "counts": ("count", pl.Int32())}  # by kind of selection
_TEXTS = {"token_text": "token", "entry_text": "entry_id"}


def explode(
    source: Store | str | Path,
    indices: Iterable[int],
    *,
    token_text: bool = False,
    **storage_options: Any,
) -> pl.DataFrame:
    """A DataFrame of the entries of some samples, in the order asked for, by position and id.

    * ``sample_id`` string, ``index`` int64: the sample, and its number in the store
    * ``position`` int32, ``token`` int32: the scored position, and the token that stands there
    * ``entry_id`` int32, ``logprob`` float32: the entry; nats
    * ``tail`` bool (``pps`` only): whether it was sampled; ``count`` int32 (``counts`` only)
    * ``rest`` and each scalar float32: those of the position, repeated for each of its entries

    A position without entries has no row. With ``token_text``, ``token_text`` and ``entry_text``
    follow the ids they spell: a token that is no whole UTF-8 has its other bytes as ``\\xNN``; null
    for an id without a token.

    Raises as ``kdstore.open``, whose options it takes, IndexError for an index that the store does
    not have, and CorruptShardError on damage. An opened store may be given instead.

    >>> import kdstore
    >>> entries = kdstore.explode("STORE", [0], token_text=True)  # doctest: +SKIP
    >>> entries.filter(position=5).select("entry_text", "logprob")  # doctest: +SKIP
    """
    store = opened(source, storage_options)
    numbers = list(indices)
    samples = store.__getitems__(numbers)
    numbers = [number % len(store) for number in numbers]
    schema = _schema(store, samples)
    parts = [_entries(*pair, schema) for pair in zip(numbers, samples, strict=True)]
    entries = pl.concat([pl.DataFrame(schema=schema), *parts])
    return _with_text(entries, store.token_table()) if token_text else entries


def _schema(store: Store, samples: Sequence[Sample]) -> dict[str, pl.DataType]:
    """The columns, which are the same for no samples: overlays' scalars take a look at one."""
    codec = store.decoder.codec
    some = samples or (store.__getitems__([0]) if len(store) else [])
    scalars = _signal(some[0]).scalars if some else codec.scalars
    own = _OWN.get(codec.selection.partition(":")[0])
    columns = {
        "sample_id": pl.String(),
        "index": pl.Int64(),
        "position": pl.Int32(),
        "token": pl.Int32(),
        "entry_id": pl.Int32(),
        "logprob": pl.Float32(),
        **(dict([own]) if own else {}),
        "rest": pl.Float32(),
    }
    if taken := {*columns, *_TEXTS} & {*scalars}:
        raise UsageError(
            "a scalar of an overlay has the name of a column",
            where=store.folder.url,
            expected=f"none of {[*columns, *_TEXTS]}",
            got=", ".join(sorted(taken)),
            todo="give a store that was opened without it: kdstore.open(url, overlays=[…])",
        )
    return {**columns, **dict.fromkeys(scalars, pl.Float32())}


def _entries(index: int, sample: Sample, schema: dict[str, pl.DataType]) -> pl.DataFrame:
    signal = _signal(sample)
    rows_N = signal.rows_N
    positions_N = sample.positions_S[rows_N]
    columns = {
        "sample_id": [sample.sample_id] * signal.num_entries,
        "index": np.full(signal.num_entries, index),
        "position": positions_N,
        "token": sample.input_ids_T[positions_N],
        "entry_id": signal.ids_N,
        "logprob": signal.logprobs_N,
        "tail": signal.tail_N,
        "count": signal.counts_N,
        "rest": signal.rest_S[rows_N],
        **{name: values[rows_N] for name, values in signal.scalars.items()},
    }
    return pl.DataFrame({name: columns[name] for name in schema}, schema=schema)


def _signal(sample: Sample) -> SparseSignal:
    assert sample.signal is not None  # a store's sample always has one
    return sample.signal


def _with_text(entries: pl.DataFrame, table: TokenTable) -> pl.DataFrame:
    for text, ids in _TEXTS.items():
        column = pl.Series(text, _texts(entries[ids].to_numpy(), table), pl.String())
        entries = entries.insert_column(entries.get_column_index(ids) + 1, column)
    return entries


def _texts(ids_N: NDArray[np.int32], table: TokenTable) -> list[str | None]:
    found = (table.bytes_V[i] if i < len(table) else None for i in ids_N.tolist())
    return [None if token is None else token.decode(errors="backslashreplace") for token in found]
