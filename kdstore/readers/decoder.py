"""Stored rows to samples: several rows at once, since a codec decodes many as fast as one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import SignalCodec
from kdstore.codecs.planes import Plane, Planes
from kdstore.codecs.rows import (
    MAX_JSON_CHARS,
    PLAIN_COLUMNS,
    RUNS,
    decode_runs,
    encode_runs,
)
from kdstore.errors import CorruptShardError
from kdstore.header import Header
from kdstore.layout import MAIN_SIGNAL, signal_column
from kdstore.readers.columns import Columns
from kdstore.readers.rows import Cells
from kdstore.sample import Sample, Span
from kdstore.signal import SparseSignal

_JSON_TYPES = {"messages": list, "metadata": dict}


@dataclass(frozen=True)
class RowDecoder:
    """Turns stored rows into samples: the codec of a signal, and the header it came from."""

    header: Header
    codec: SignalCodec
    signal: str
    columns: Columns | None = None

    def columns_of(self, covered: Mapping[str, Sequence[str]]) -> list[str]:
        """The columns of a shard that are read; ``covered`` are those under each of its hashes."""
        if self.columns is None:
            return list(
                dict.fromkeys(name for column, some in covered.items() for name in (*some, column))
            )
        stored = next(iter(covered.values()))
        planes = [signal_column(self.signal, plane) for plane in (RUNS, *self.codec.planes)]
        return [*self.columns.plain(stored), *planes]

    def samples(self, rows: Cells) -> list[Sample]:
        """The samples of some rows; CorruptShardError unless all of each fits together."""
        names = self._plain(rows)
        samples = [
            self._unsigned(dict(zip(names, cells, strict=True)))
            for cells in zip(*(rows[name] for name in names), strict=True)
        ]
        for sample, signal in zip(samples, self._signals(rows, samples), strict=True):
            vars(sample)["signal"] = signal  # nobody has seen the sample without it
        return samples

    def additions(self, rows: Cells, samples: Sequence[Sample]) -> list[SparseSignal]:
        """What an overlay's rows add to samples; CorruptShardError for the row of another."""
        runs = rows[signal_column(self.signal, RUNS)]
        triples = zip(rows["sample_id"], rows["num_scored"], runs, strict=True)
        for (sample_id, num_scored, cell), sample in zip(triples, samples, strict=True):
            _expect("sample_id", sample_id, sample.sample_id)
            _expect("num_scored", int(num_scored), sample.num_scored)
            _expect(RUNS, cell, encode_runs([sample]).cell(0))
        return self._signals(rows, samples)

    def planes(self, rows: Cells) -> Planes:
        """The planes of some rows' signal, one row after the other."""
        return {name: _plane(rows[signal_column(self.signal, name)]) for name in self.codec.planes}

    def _plain(self, rows: Cells) -> list[str]:
        """The columns of a sample without its signal."""
        runs = signal_column(self.signal, RUNS)
        return [name for name in rows if name in PLAIN_COLUMNS or name == runs]

    def _unsigned(self, cells: dict[str, Any]) -> Sample:
        """The sample without its signal."""
        ids = np.array(cells["input_ids"], dtype=np.int32)  # a copy: torch refuses Arrow's buffer
        num_tokens = int(cells["num_tokens"])
        num_scored = int(cells["num_scored"]) if self.signal == MAIN_SIGNAL else None
        _expect("num_tokens", num_tokens, len(ids))
        _check_ids(ids, self.codec.order.vocab_size)
        runs = bytes(cells[signal_column(self.signal, RUNS)])
        return Sample(
            sample_id=cells["sample_id"],
            input_ids_T=ids,
            spans=tuple(map(_span, cells.get("spans", ()))),
            runs=decode_runs(runs, num_tokens=num_tokens, num_scored=num_scored),
            text=cells.get("text"),
            messages=_json(cells, "messages"),
            metadata=_json(cells, "metadata"),
        )

    def _signals(self, rows: Cells, samples: Sequence[Sample]) -> list[SparseSignal]:
        """The signal of each row, all decoded together.

        Rows forged with right hashes could make up for each other's lengths; ``verify`` reads each
        alone.
        """
        previous = [sample.previous_S for sample in samples]
        previous_S = np.concatenate([np.zeros(0, np.int32), *previous])
        signal = self.codec.decode(self.planes(rows), previous_S)
        ends = np.cumsum([0, *map(len, previous)]).tolist()
        return [signal[start:end] for start, end in pairwise(ends)]


def _plane(cells: Sequence[memoryview]) -> Plane:
    offsets: NDArray[np.int64] = np.cumsum([0, *map(len, cells)])
    data = cells[0] if len(cells) == 1 else b"".join(cells)
    return Plane(np.frombuffer(data, dtype=np.uint8), offsets)


def _span(cell: dict[str, Any] | None) -> Span:
    if cell is None or None in cell.values():
        raise ValueError(f"a span has a null: {cell}")
    return Span(**cell)


def _json(cells: Mapping[str, Any], name: str) -> Any:
    text = cells.get(name)
    if text is None:
        return None
    if len(text) > MAX_JSON_CHARS:
        raise ValueError(f"{name} of {len(text)} characters, at most {MAX_JSON_CHARS}")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, _JSON_TYPES[name]):
        raise ValueError(f"{name} is a {type(value).__name__}")
    return value


def _expect(name: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise CorruptShardError(
            f"{name} differs from the row's content", expected=expected, got=got
        )


def _check_ids(ids: NDArray[np.int32], vocab_size: int) -> None:
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        raise CorruptShardError(
            "a token id lies outside the vocabulary",
            expected=f"0 to {vocab_size - 1}",
            got=f"{int(ids.min())} to {int(ids.max())}",
        )
