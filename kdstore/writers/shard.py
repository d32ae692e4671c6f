"""The shard writer: scored samples in, one immutable Parquet file out.

Signals are encoded a row group at a time. Statistics are kept for the id and the counts only (over
blobs they blow the footer up), dictionaries are off, and zstd does the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from kdstore.codecs.base import Positions, SignalCodec
from kdstore.codecs.planes import Plane
from kdstore.codecs.rows import (
    PLAIN_COLUMNS,
    RUNS,
    encode_runs,
    plain_arrays,
    row_hashes,
    span_dict,
)
from kdstore.commit import ShardRecord
from kdstore.errors import SignalError
from kdstore.hashing import RowKeys, canonical_json
from kdstore.header import Header
from kdstore.layout import MAIN_SIGNAL, hash_column, signal_column
from kdstore.sample import Sample
from kdstore.signal import SparseSignal

ROW_GROUP_BYTES = 8 << 20
MAX_CELL_BYTES = 256 << 20
FOOTER_TAIL_BYTES = 8
IDS_LEVEL = 9


@dataclass(frozen=True)
class ShardWriter:
    """What every shard of a store has in common: the codec of each signal, ``main`` first."""

    header: Header
    codecs: Mapping[str, SignalCodec]
    draw: int = 0

    @property
    def plain_columns(self) -> list[str]:
        """The columns that are no signal's."""
        return [name for name in PLAIN_COLUMNS if name in self.header.identity["columns"]]

    @property
    def columns(self) -> list[str]:
        """All columns, in the order of the file: each signal's end with the hash that covers it."""
        columns = self.plain_columns
        for name, codec in self.codecs.items():
            columns += [signal_column(name, plane) for plane in (RUNS, *codec.planes)]
            columns.append(hash_column(name))
        return columns

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema, with the store's compact identity as metadata of the file."""
        types = {**PLAIN_COLUMNS, **{hash_column(name): pa.uint64() for name in self.codecs}}
        fields = [(name, types.get(name, pa.large_binary())) for name in self.columns]
        identity = {
            "format_version": self.header.format_version,
            "config_digest": self.header.config_digest,
            "identity": self.header.identity,
        }
        return pa.schema(fields, metadata={"kdstore": canonical_json(identity)})

    def write(self, target: Path, groups: Sequence[list[Sample]], *, path: str) -> ShardRecord:
        """Fill ``target`` with row groups of samples with signals; the record calls it ``path``."""
        with pq.ParquetWriter(
            target,
            self.schema,
            compression="zstd",
            compression_level=self._levels(),
            use_dictionary=False,
            write_statistics=["sample_id", "num_tokens", "num_scored"],
            write_page_index=True,
            write_page_checksum=True,
            write_batch_size=64,
        ) as writer:
            for group in groups:
                writer.write_batch(self._batch(group), row_group_size=len(group))
        return _record(target, [sample for group in groups for sample in group], path)

    def _levels(self) -> dict[str, int]:
        """zstd levels by column; those that are not named have Arrow's default, 1."""
        levels = {
            signal_column(name, plane): codec.compression_level(plane)
            for name, codec in self.codecs.items()
            for plane in codec.planes
        }
        ids = {"input_ids.list.element": IDS_LEVEL} if "input_ids" in self.columns else {}
        return levels | ids

    def _batch(self, samples: Sequence[Sample]) -> pa.RecordBatch:
        plain = plain_arrays(samples)
        arrays = dict(plain)
        for name in self.codecs:
            arrays |= self._signal_arrays(name, [_as_signal(name, s) for s in samples], plain)
        return pa.record_batch([arrays[name] for name in self.columns], schema=self.schema)

    def _signal_arrays(
        self, name: str, samples: Sequence[Sample], plain: dict[str, pa.Array]
    ) -> dict[str, pa.Array]:
        """The columns of one signal, the hash that covers them among them."""
        codec = self.codecs[name]
        planes = {RUNS: encode_runs(samples), **self._encode(codec, samples)}
        columns = {signal_column(name, plane): planes[plane] for plane in (RUNS, *codec.planes)}
        covered = [*(self.plain_columns if name == MAIN_SIGNAL else ["sample_id"]), *columns]
        cells = {column: plane.cells() for column, plane in columns.items()}
        hashes = row_hashes(covered, {**_plain_cells(samples, plain), **cells})
        arrays = {column: _array(column, plane) for column, plane in columns.items()}
        return {**arrays, hash_column(name): pa.array(hashes, pa.uint64())}

    def _encode(self, codec: SignalCodec, samples: Sequence[Sample]) -> dict[str, Plane]:
        signals = [_checked_signal(sample) for sample in samples]
        splits = np.cumsum([0, *map(len, signals)], dtype=np.int64)
        keys = RowKeys.of_samples(
            [(sample.sample_id, sample.positions_S) for sample in samples],
            seed=int(self.header.identity["seed"]),
            draw=self.draw,
        )
        previous = [sample.previous_S for sample in samples]
        positions = Positions(keys, splits, np.concatenate(previous))
        return codec.encode(_concat(signals, codec), positions)


def row_groups(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Samples in groups of about ``ROW_GROUP_BYTES`` before compression, at least one each."""
    group: list[Sample] = []
    size = 0
    for sample in samples:
        group.append(sample)
        size += 4 * sample.num_tokens + _signal_bytes(sample) + text_chars(sample)
        size += _signal_bytes(sample.audit) if sample.audit else 0
        if size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _signal_bytes(sample: Sample) -> int:
    return 8 * sample.num_scored + 3 * (sample.signal.num_entries if sample.signal else 0)


def text_chars(sample: Sample) -> int:
    """Characters of what is kept of a sample beside its tokens, as JSON."""
    texts = (sample.messages, sample.metadata)
    return len(sample.text or "") + sum(len(json.dumps(text)) for text in texts if text)


def _as_signal(name: str, sample: Sample) -> Sample:
    """The sample with the runs and values of a named signal."""
    if name == MAIN_SIGNAL:
        return sample
    if sample.audit is None:
        raise SignalError(
            "a sample lacks its audit",
            where=f"sample {sample.sample_id!r}",
            expected=f"signal {name!r}",
            got=None,
        )
    return sample.audit


def _checked_signal(sample: Sample) -> SparseSignal:
    if sample.signal is None or len(sample.signal) != sample.num_scored:
        raise SignalError(
            "the signal does not answer the sample's scored positions",
            where=f"sample {sample.sample_id!r}",
            expected=sample.num_scored,
            got=None if sample.signal is None else len(sample.signal),
        )
    return sample.signal


def _concat(signals: Sequence[SparseSignal], codec: SignalCodec) -> SparseSignal:
    """All signals as one; if none has a position, one of no positions with the codec's scalars."""
    if any(len(signal) for signal in signals):
        return SparseSignal.concat(signals)
    scalars = {name: np.zeros(0, np.float32) for name in codec.scalars}
    return SparseSignal.from_arrays(
        codec.selection, [0], [], [], counts_N=[], tail_N=[], scalars=scalars
    )


def _array(column: str, plane: Plane) -> pa.Array:
    largest = int(np.diff(plane.offsets).max(initial=0))
    if largest > MAX_CELL_BYTES:
        raise SignalError(
            f"a cell of column {column!r} is too large",
            expected=f"at most {MAX_CELL_BYTES} bytes",
            got=largest,
            todo="split the sample with --max-length, or audit less with --audit-fraction",
        )
    buffers = [None, pa.py_buffer(plane.offsets.astype("<i8")), pa.py_buffer(plane.data)]
    return pa.Array.from_buffers(pa.large_binary(), len(plane.offsets) - 1, buffers)


def _plain_cells(samples: Sequence[Sample], plain: dict[str, pa.Array]) -> dict[str, list[Any]]:
    return {
        "sample_id": [sample.sample_id for sample in samples],
        "num_tokens": [sample.num_tokens for sample in samples],
        "num_scored": [sample.num_scored for sample in samples],
        "input_ids": [sample.input_ids_T for sample in samples],
        "spans": [[span_dict(span) for span in sample.spans] for sample in samples],
        **{name: plain[name].to_pylist() for name in ("text", "messages", "metadata")},
    }


def _record(target: Path, samples: Sequence[Sample], path: str) -> ShardRecord:
    digest = xxhash.xxh3_128()
    with target.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        size = file.tell()
        file.seek(size - FOOTER_TAIL_BYTES)
        footer_bytes = int.from_bytes(file.read(4), "little") + FOOTER_TAIL_BYTES
        file.seek(size - footer_bytes)
        footer = file.read()
    return ShardRecord(
        path=path,
        bytes=size,
        rows=len(samples),
        tokens=sum(sample.num_tokens for sample in samples),
        scored=sum(sample.num_scored for sample in samples),
        xxh3_128=digest.hexdigest(),
        footer_bytes=footer_bytes,
        footer_xxh3=xxhash.xxh3_64_hexdigest(footer),
    )
