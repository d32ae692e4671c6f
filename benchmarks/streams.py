"""What streams of integers cost: through zstd as planes, and by their entropy."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from numpy.typing import NDArray

from kdstore.codecs import IdOrder, Plane
from kdstore.codecs.ids import grouped_runs
from kdstore.codecs.shorts import encode_shorts

Numbers = NDArray[np.int64]
Row = tuple[str, dict[str, float]]  # a variant and its figures


def zstd_bytes(data: bytes, *, level: int = 1, window_log: int | None = None) -> int:
    """Size of one frame."""
    if window_log is None:
        return len(zstandard.ZstdCompressor(level=level).compress(data))
    options = zstandard.ZstdCompressionParameters.from_level(
        level, window_log=window_log, enable_ldm=True
    )
    return len(zstandard.ZstdCompressor(compression_params=options).compress(data))


def shorts_bytes(values: Numbers, *, level: int = 1) -> int:
    """Size of a stream as shorts, both planes compressed."""
    planes = encode_shorts("x", values, np.array([0, len(values)]))
    return sum(zstd_bytes(plane.data.tobytes(), level=level) for plane in planes.values())


def low_high_bytes(values: Numbers, *, level: int = 1) -> int:
    """Size of a stream as 16-bit numbers, low bytes and high bytes in a plane each."""
    halves = (values & 255, values >> 8)
    return sum(zstd_bytes(half.astype(np.uint8).tobytes(), level=level) for half in halves)


def entropy_bytes(values: NDArray[Any]) -> float:
    """Size at the stream's own order-0 entropy: what no coder without context gets below."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def adaptive_bytes(values: Numbers, contexts: NDArray[Any] | None = None) -> float:
    """Size an adaptive arithmetic coder needs, one model a context, that learns as it goes.

    Values are coded as shorts: the code byte by a Dirichlet(1/2) model over 256 codes
    (Krichevsky and Trofimov, 1981), extra bytes as they are.
    """
    planes = encode_shorts("x", values, np.array([0, len(values)]))
    codes, total = planes["x"].data.astype(np.int64), float(len(planes["x/extra"].data))
    of = np.zeros(len(codes), np.int64) if contexts is None else contexts.astype(np.int64)
    log_gamma = np.vectorize(math.lgamma)
    for context in np.unique(of):
        counts = np.bincount(codes[of == context], minlength=256)
        nats = math.lgamma(counts.sum() + 128) - math.lgamma(128)
        nats -= float((log_gamma(counts + 0.5) - math.lgamma(0.5)).sum())
        total += nats / math.log(2) / 8
    return total


def run_gaps(
    ids_N: NDArray[np.int32], previous_N: NDArray[np.int32], runs_N: Numbers, order: IdOrder
) -> tuple[Numbers, Numbers]:
    """Gaps of runs of ids, ascending in an id order, and which entry each gap is of."""
    by_run = np.argsort(runs_N, kind="stable")
    firsts = np.flatnonzero(np.diff(runs_N[by_run], prepend=-1))
    indptr = np.append(firsts, len(by_run))
    previous_S, one = previous_N[by_run[firsts]], np.zeros(len(by_run), dtype=np.uint8)
    (runs,) = grouped_runs(ids_N[by_run], indptr, one, 1, previous_S=previous_S, order=order)
    return runs.gaps_G.astype(np.int64), by_run[runs.entries_G]


def parquet_bytes(
    planes: Mapping[str, Plane],
    levels: Mapping[str, int],
    *,
    samples_per_group: int | None = None,
    encoding: str | None = None,
) -> int:
    """Size of a Parquet file of the planes, written as shards are."""
    arrays = {
        name: pa.Array.from_buffers(
            pa.large_binary(),
            len(plane.offsets) - 1,
            [None, pa.py_buffer(plane.offsets.astype("<i8")), pa.py_buffer(plane.data)],
        )
        for name, plane in planes.items()
    }
    table, sink = pa.table(arrays), io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=samples_per_group or len(table),
        compression="zstd",
        compression_level=dict(levels),
        use_dictionary=False,
        column_encoding=dict.fromkeys(arrays, encoding) if encoding else None,
        write_statistics=False,
        write_page_index=True,
        write_page_checksum=True,
        write_batch_size=64,
    )
    return len(sink.getvalue())


def group_frames(plane: Plane, samples_per_group: int) -> list[bytes]:
    """The bytes of a plane, so many samples at a time."""
    bounds = [*plane.offsets[:-1:samples_per_group], plane.offsets[-1]]
    return [plane.data[a:b].tobytes() for a, b in pairwise(bounds)]


def dictionary_of(frames: Iterable[bytes], *, size: int) -> zstandard.ZstdCompressionDict | None:
    """A dictionary trained on frames cut to 1 KB pieces; None where there is too little."""
    pieces: list[Any] = [
        frame[i : i + 1024] for frame in frames for i in range(0, len(frame), 1024)
    ]
    try:
        return zstandard.train_dictionary(size, pieces)
    except zstandard.ZstdError:
        return None
