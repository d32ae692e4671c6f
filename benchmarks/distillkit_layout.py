"""The layout of DistillKit's stored logits, as a baseline: what it costs to write and to read.

By its published configuration at k = 50: ids bit-packed at 18 bits each in order of probability,
the largest log-probability exact in bfloat16, the others a combination of 1, j and the root of j at
place j, with three float32 coefficients fitted by least squares: 127 bytes a position before
compression.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdstore.codecs.jit import kernel
from kdstore.signal import SparseSignal

K, BITS, TERMS = 50, 18, 3
ID_BYTES = -(-K * BITS // 8)
_J = np.arange(1, K, dtype=np.float64)
_PLACES = np.stack([np.ones(K - 1), _J, np.sqrt(_J)], axis=1)
_FIT = np.linalg.pinv(_PLACES)


def write(signal: SparseSignal, splits: NDArray[np.int64]) -> bytes:
    """A Parquet file of top-50 signals, a row a sample."""
    columns = cells(signal)
    table = pa.table({name: _cells(values, splits) for name, values in columns.items()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=1, use_dictionary=False)
    return sink.getvalue()


def cells(signal: SparseSignal) -> dict[str, NDArray[Any]]:
    """``ids`` uint8 [S, 113], ``exact`` uint16 [S] and ``coefficients`` float32 [S, 3]."""
    S = len(signal)
    ids, logprobs = signal.ids_N.reshape(S, K), signal.logprobs_N.reshape(S, K)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    packed = np.zeros((S, ID_BYTES), dtype=np.uint8)
    _pack(ids, packed)
    exact = logprobs[:, 0].astype("<f4").view("<u4") + 0x8000 >> 16
    coefficients = (logprobs[:, 1:].astype(np.float64) @ _FIT.T).astype("<f4")
    return {"ids": packed, "exact": exact.astype("<u2"), "coefficients": coefficients}


def read(data: bytes) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """int32 ids and float32 log-probabilities [S, 50] in order of probability."""
    table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    packed, exact, coefficients = (_bytes(table, name) for name in table.column_names)
    packed = packed.reshape(-1, ID_BYTES)
    ids = np.empty((len(packed), K), dtype=np.int32)
    _unpack(packed, ids)
    logprobs = np.empty((len(packed), K), dtype=np.float32)
    logprobs[:, 0] = (exact.view("<u2").astype("<u4") << 16).view("<f4")
    logprobs[:, 1:] = coefficients.view("<f4").reshape(-1, TERMS) @ _PLACES.T.astype(np.float32)
    return ids, logprobs


def _cells(values: NDArray[Any], splits: NDArray[np.int64]) -> pa.Array:
    rows = np.ascontiguousarray(values).reshape(splits[-1], -1)
    offsets = splits * rows.shape[1] * rows.itemsize
    buffers = [None, pa.py_buffer(offsets.astype("<i8")), pa.py_buffer(rows)]
    return pa.Array.from_buffers(pa.large_binary(), len(splits) - 1, buffers)


def _bytes(table: pa.Table, name: str) -> NDArray[np.uint8]:
    parts = [
        np.frombuffer(chunk.buffers()[2], np.uint8)[
            chunk.offset : np.frombuffer(chunk.buffers()[1], "<i8")[len(chunk)]
        ]
        for chunk in table[name].cast(pa.large_binary()).chunks
    ]
    return np.concatenate(parts)


@kernel
def _pack(ids: NDArray[Any], packed: NDArray[Any]) -> None:
    for s in range(len(ids)):
        held, bits, at = 0, 0, 0
        for j in range(ids.shape[1]):
            held |= int(ids[s, j]) << bits
            bits += BITS
            while bits >= 8:
                packed[s, at] = held & 255
                held >>= 8
                bits -= 8
                at += 1
        if bits:
            packed[s, at] = held


@kernel
def _unpack(packed: NDArray[Any], ids: NDArray[Any]) -> None:
    for s in range(len(ids)):
        held, bits, at = 0, 0, 0
        for j in range(ids.shape[1]):
            while bits < BITS:
                held |= int(packed[s, at]) << bits
                bits += 8
                at += 1
            ids[s, j] = held & ((1 << BITS) - 1)
            held >>= BITS
            bits -= BITS
