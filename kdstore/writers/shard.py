"""The shard writer: scored samples in, one immutable Parquet file out.

Signals are encoded a row group at a time. Statistics are kept for the id and the counts only (over
blobs they blow the footer up), dictionaries are off, and zstd does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from kdstore.codecs.base import Positions, SignalCodec
from kdstore.codecs.planes import Plane
from kdstore.codecs.rows import (
    PLAIN_COLUMNS,
    ROW_HASH,
    RUNS,
    encode_runs,
    plain_arrays,
    row_hash,
    span_dict,
)
from kdstore.commit import ShardRecord
from kdstore.errors import SignalError
from kdstore.hashing import RowKeys, canonical_json
from kdstore.header import Header
from kdstore.layout import signal_column
from kdstore.sample import Sample
from kdstore.signal import SparseSignal

ROW_GROUP_BYTES = 8 << 20
MAX_CELL_BYTES = 256 << 20
FOOTER_TAIL_BYTES = 8
IDS_LEVEL = 9


@dataclass(frozen=True)
class ShardWriter:
    """What every shard of a store has in common."""

    header: Header
    codec: SignalCodec
    signal: str
    draw: int = 0

    @property
    def columns(self) -> list[str]:
        """All columns, in the order of the file; the row hash covers those before it."""
        planes = [RUNS, *self.codec.planes]
        plain = [name for name in PLAIN_COLUMNS if name in self.header.identity["columns"]]
        return [*plain, *(signal_column(self.signal, plane) for plane in planes), ROW_HASH]

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema, with the store's compact identity as metadata of the file."""
        types = {**PLAIN_COLUMNS, ROW_HASH: pa.uint64()}
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
        planes = self.codec.planes
        levels = {signal_column(self.signal, p): self.codec.compression_level(p) for p in planes}
        ids = {"input_ids.list.element": IDS_LEVEL} if "input_ids" in self.columns else {}
        return levels | ids

    def _batch(self, samples: Sequence[Sample]) -> pa.RecordBatch:
        planes = {RUNS: encode_runs(samples), **self._encode(samples)}
        plain = plain_arrays(samples)
        arrays = {
            **plain,
            **{signal_column(self.signal, name): _array(name, p) for name, p in planes.items()},
        }
        hashed = self.columns[:-1]
        hashes = [
            row_hash(
                hashed, {**_plain_cells(sample, plain, row), **_cells(self.signal, planes, row)}
            )
            for row, sample in enumerate(samples)
        ]
        arrays[ROW_HASH] = pa.array(hashes, pa.uint64())
        return pa.record_batch([arrays[name] for name in self.columns], schema=self.schema)

    def _encode(self, samples: Sequence[Sample]) -> dict[str, Plane]:
        signals = [_checked_signal(sample) for sample in samples]
        splits = np.cumsum([0, *map(len, signals)], dtype=np.int64)
        keys = RowKeys.of_samples(
            [(sample.sample_id, sample.positions_S) for sample in samples],
            seed=int(self.header.identity["seed"]),
            draw=self.draw,
        )
        previous = [sample.previous_S for sample in samples]
        positions = Positions(keys, splits, np.concatenate(previous))
        return self.codec.encode(_concat(signals, self.codec), positions)


def row_groups(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Samples in groups of about ``ROW_GROUP_BYTES`` before compression, at least one each."""
    group: list[Sample] = []
    size = 0
    for sample in samples:
        group.append(sample)
        entries = sample.signal.num_entries if sample.signal else 0
        size += 4 * sample.num_tokens + 8 * sample.num_scored + 3 * entries
        if size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


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


def _array(name: str, plane: Plane) -> pa.Array:
    largest = int(np.diff(plane.offsets).max(initial=0))
    if largest > MAX_CELL_BYTES:
        raise SignalError(
            f"a cell of plane {name!r} is too large",
            expected=f"at most {MAX_CELL_BYTES} bytes",
            got=largest,
            todo="split the sample with --max-length",
        )
    buffers = [None, pa.py_buffer(plane.offsets.astype("<i8")), pa.py_buffer(plane.data)]
    return pa.Array.from_buffers(pa.large_binary(), len(plane.offsets) - 1, buffers)


def _plain_cells(sample: Sample, plain: dict[str, pa.Array], row: int) -> dict[str, object]:
    return {
        "sample_id": sample.sample_id,
        "num_tokens": sample.num_tokens,
        "num_scored": sample.num_scored,
        "input_ids": sample.input_ids_T,
        "spans": [span_dict(span) for span in sample.spans],
        **{name: plain[name][row].as_py() for name in ("text", "messages", "metadata")},
    }


def _cells(signal: str, planes: dict[str, Plane], row: int) -> dict[str, bytes]:
    return {signal_column(signal, name): plane.cell(row) for name, plane in planes.items()}


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
