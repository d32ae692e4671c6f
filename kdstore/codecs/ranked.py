"""Codec of topk and topp: one value byte per entry, the rest as its own scalar.

A probability goes to the nearest of 197 levels of its square root, where the levels are uniform in
what they cost in KL: 2.0e-4 nats for the top 50, against 3.3e-4 for an eighth of a nat. The lowest
level decodes to a positive floor. Decoding scales entries so that they and the rest sum to one.

Values lie in eight planes by how flat the position is, which its rest and its number of entries
tell: those of a peaked position are nearly all small, and zstd should not see them among others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import Positions, SignalCodec
from kdstore.codecs.ids import BAD_RANK, NOWHERE, TWICE, UNUSED, grouped_runs, read_run, refuse
from kdstore.codecs.jit import kernel, u
from kdstore.codecs.planes import FreshMemory, Plane, Planes, expect_length
from kdstore.codecs.shorts import MISSING, decode_shorts, encode_shorts, read_stream, short_names
from kdstore.codecs.sorting import id_buffers, place
from kdstore.errors import CorruptShardError, SignalError
from kdstore.signal import SparseSignal

VALUE_STEPS = 196
FLOOR = (0.25 / VALUE_STEPS) ** 2
_TABLE = np.append(FLOOR, (np.arange(1, VALUE_STEPS + 1) / VALUE_STEPS) ** 2)
_LOG_TABLE = np.log(_TABLE)
REST_STEPS = 16  # to a nat of log-odds
REST_EVEN = 960  # code of a rest of one half
_REST_MAX = 14527  # the last code with one extra byte
CLASSES = 8
_CLASS_STEP = 20
_CLASS_START = 96


class RankedCodec(SignalCodec):
    """Shorts ``entries``, ``rest`` and ``id``, and planes ``value/0`` to ``value/7``."""

    name = "ranked/1"

    @property
    def entry_planes(self) -> tuple[str, ...]:
        """Names of the planes."""
        return (
            *short_names("entries", "rest", "id"),
            *(f"value/{index}" for index in range(CLASSES)),
        )

    def compression_level(self, plane: str) -> int:
        """Level 9 for ids, whose runs repeat: 16 % fewer bytes than level 3 (docs/rate.md)."""
        return 9 if plane == "id" else super().compression_level(plane)

    def encode_entries(self, signal: SparseSignal, positions: Positions) -> dict[str, Plane]:
        """One run of ids per position; nothing is drawn."""
        splits = positions.splits
        nowhere = np.full(len(signal), NOWHERE, np.int32)
        group_N = np.zeros(signal.num_entries, dtype=np.uint8)
        (run,) = grouped_runs(
            signal.ids_N, signal.indptr, group_N, 1, previous_S=nowhere, order=self.order
        )
        roots = np.exp(signal.logprobs_N[run.entries_G].astype(np.float64) / 2)
        codes = np.minimum(np.rint(roots * VALUE_STEPS), VALUE_STEPS).astype(np.uint8)
        rest = rest_codes(signal.rest_S)
        class_S = value_classes(rest, signal.entries_S)
        class_N = np.repeat(class_S.astype(np.uint8), signal.entries_S)
        planes = {
            **encode_shorts("entries", signal.entries_S, splits),
            **encode_shorts("rest", rest, splits),
            **encode_shorts("id", run.gaps_G, run.bounds(splits)),
        }
        for index in range(CLASSES):
            lengths = np.where(class_S == index, signal.entries_S, 0)
            ends = np.concatenate([[0], np.cumsum(lengths)])
            planes[f"value/{index}"] = Plane(codes[class_N == index], ends[splits])
        return planes

    def decode_entries(
        self, planes: Planes, previous_S: NDArray[np.int32], memory: FreshMemory
    ) -> SparseSignal:
        """Entries scaled to a sum of one minus the rest."""
        S = len(previous_S)
        lengths = decode_shorts(planes, "entries", length=S).astype(np.int64)
        rest = decode_shorts(planes, "rest", length=S, none=True)
        classes = value_classes(rest, lengths)
        values, starts = _values(planes, classes, lengths)
        expect_length("id", planes["id"].data, int(lengths.sum()))
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        rest_S = rest_values(rest)
        with np.errstate(divide="ignore"):
            log_kept_S = np.log(-np.expm1(rest_S))
        ids_N, logprobs_N = memory.empty(int(indptr[-1]), "<i4", "<f4")
        status, row = _decode(
            read_stream(planes, "id"),
            self.order.id_of_V,
            values,
            classes,
            starts,
            log_kept_S,
            indptr,
            ids_N,
            logprobs_N,
        )
        refuse(status, row)
        return SparseSignal.from_arrays(self.selection, indptr, ids_N, logprobs_N, rest_S=rest_S)


def value_classes(rest_S: NDArray[np.integer], entries_S: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [S] 0 … 7: which value plane a position has, from its rest's code and entries.

    About log(entries) minus the log-odds of the rest, in steps of a nat; in integers, so that every
    reader agrees.
    """
    bits = np.frexp(entries_S.astype(np.float64))[1].astype(np.int64)
    peaked = np.where(rest_S == MISSING, 0, rest_S.astype(np.int64) - REST_EVEN)
    flat = 11 * bits - peaked
    return np.asarray(np.clip((flat + _CLASS_START) // _CLASS_STEP, 0, CLASSES - 1))


def _values(
    planes: Planes, class_S: NDArray[np.int64], lengths_S: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All value codes, plane by plane, and where each plane begins."""
    parts = [planes[f"value/{index}"].data for index in range(CLASSES)]
    expected = np.bincount(class_S, weights=lengths_S, minlength=CLASSES)
    for index, part in enumerate(parts):
        expect_length(f"value/{index}", part, int(expected[index]))
    values = np.concatenate(parts)
    if len(values) and int(values.max()) > VALUE_STEPS:
        raise CorruptShardError(
            "unknown value code", expected=f"at most {VALUE_STEPS}", got=int(values.max())
        )
    return values, np.cumsum([0, *map(len, parts)])[:CLASSES]


@kernel
def _decode(
    stream: tuple[NDArray[Any], ...],
    id_of_V: NDArray[Any],
    values: NDArray[Any],
    class_S: NDArray[Any],
    cursor: NDArray[Any],
    log_kept_S: NDArray[Any],
    indptr: NDArray[Any],
    ids_N: NDArray[Any],
    logprobs_N: NDArray[Any],
) -> tuple[int, int]:
    """Status (0: fine, else see ``ids.WRONG``) and position; fills the entries in order of id.

    ``cursor`` holds where each class's next value is. Entries sum to what is kept.
    """
    ids, places = id_buffers(indptr)
    V, extra = len(id_of_V), 0
    for s in range(len(class_S)):
        first, n, at = indptr[s], indptr[s + 1] - indptr[s], cursor[class_S[s]]
        extra = read_run(stream, first, extra, n, id_of_V, V, 0, 0, ids, 0)
        if extra < 0:
            return BAD_RANK, s
        if not place(ids, n, places):
            return TWICE, s
        total = 0.0
        for j in range(n):
            total += _TABLE[u(values[u(at + j)])]
        scale = log_kept_S[s] - np.log(total)
        for j in range(n):
            slot = first + places[u(j)]
            ids_N[u(slot)] = ids[u(j)]
            logprobs_N[u(slot)] = _LOG_TABLE[u(values[u(at + j)])] + scale
        cursor[class_S[s]] += n
    return (0 if extra == len(stream[1]) else UNUSED), len(class_S)


def rest_codes(rest_S: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64 [S]: minus the log-odds of the rest to the nearest 1/16, ``MISSING`` for no rest.

    Log-odds keep both the rest and what it leaves to the entries away from zero.
    """
    rest = np.minimum(rest_S.astype(np.float64), -1e-12)
    if np.isnan(rest).any():
        raise SignalError("the rest is not a number", expected="log mass at most 0", got="NaN")
    finite = np.isfinite(rest)
    log_odds = np.where(finite, rest, -1.0)
    log_odds = log_odds - np.log(-np.expm1(log_odds))
    codes = np.clip(REST_EVEN - np.rint(log_odds * REST_STEPS), 0, _REST_MAX)
    return np.where(finite, codes, MISSING).astype(np.int64)


def rest_values(codes_S: NDArray[np.integer]) -> NDArray[np.float64]:
    """float64 [S]: the log rest of each code."""
    log_odds = (REST_EVEN - codes_S.astype(np.int64)) / REST_STEPS
    return np.where(codes_S == MISSING, -np.inf, -np.logaddexp(0.0, -log_odds))
