"""Tokenised samples on the local disk: as many as there are, and none of them in memory."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdstore.codecs.rows import PLAIN_COLUMNS, plain_arrays
from kdstore.sample import Sample, ScoreRule, Span

BATCH_TOKENS = 1 << 20
_SCHEMA = pa.schema(list(PLAIN_COLUMNS.items()))


class TokenFile:
    """Samples in a temporary folder, which is removed when nobody holds this any more.

    ``add`` them, then ``finish``; after that, ``samples`` reads them through a memory map.
    ``folder`` has room for other files that are to go with it.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kdstore-online-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._path = str(self.folder / "tokens.arrow")
        self._writer = pa.ipc.new_file(self._path, _SCHEMA)
        self._waiting: list[Sample] = []
        self._waiting_tokens = 0
        self._first_rows = [0]

    def add(self, samples: Sequence[Sample]) -> None:
        """Write samples behind those that are there."""
        self._waiting.extend(samples)
        self._waiting_tokens += sum(sample.num_tokens for sample in samples)
        if self._waiting_tokens >= BATCH_TOKENS:
            self._write()

    def finish(self) -> None:
        """End writing and begin to read."""
        if self._waiting:
            self._write()
        self._writer.close()
        self._reader = pa.ipc.open_file(pa.memory_map(self._path))

    def samples(self, rows: Sequence[int], *, score: ScoreRule) -> list[Sample]:
        """The samples of some rows, in the order asked for, without signals."""
        places = np.searchsorted(self._first_rows, rows, side="right") - 1
        return [
            self._sample(place, row - self._first_rows[place]).with_score_rule(score)
            for place, row in zip(places.tolist(), rows, strict=True)
        ]

    def _sample(self, batch: int, row: int) -> Sample:
        cells = self._reader.get_batch(batch).slice(row, 1)
        ids = cells["input_ids"].flatten().to_numpy().copy()  # torch refuses Arrow's memory
        rest = cells.drop_columns(["input_ids"]).to_pylist()[0]
        return Sample(
            rest["sample_id"],
            ids,
            spans=tuple(Span(**span) for span in rest["spans"]),
            text=rest["text"],
            messages=_value(rest["messages"]),
            metadata=_value(rest["metadata"]),
        )

    def _write(self) -> None:
        arrays = plain_arrays(self._waiting)
        self._writer.write(pa.record_batch(list(arrays.values()), schema=_SCHEMA))
        self._first_rows.append(self._first_rows[-1] + len(self._waiting))
        self._waiting, self._waiting_tokens = [], 0


def _value(text: str | None) -> Any:
    return None if text is None else json.loads(text)
