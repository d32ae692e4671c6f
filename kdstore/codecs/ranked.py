"""Codec of topk and topp: one value byte per entry, the rest as its own scalar.

A probability goes to the nearest of 197 levels of its square root, where the levels are uniform in
what they cost in KL: 1.8e-4 nats for the top 50, against 3.2e-4 for an eighth of a nat. The lowest
level decodes to a positive floor. Decoding scales entries so that they and the rest sum to one.

Values lie in eight planes by how flat the position is, which its rest and its number of entries
tell: those of a peaked position are nearly all small, and zstd should not see them among others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import Positions, SignalCodec
from kdstore.codecs.ids import decode_runs, gaps_of, ranks_of
from kdstore.codecs.planes import Plane, Planes, expect_length
from kdstore.codecs.shorts import MISSING, decode_shorts, encode_shorts, short_names
from kdstore.codecs.sorting import sort_entries
from kdstore.errors import CorruptShardError, SignalError
from kdstore.signal import SparseSignal, segment_sum

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
        """Level 9 for ids, whose runs repeat: 14 % fewer bytes than level 3."""
        return 9 if plane == "id" else super().compression_level(plane)

    def encode_entries(self, signal: SparseSignal, positions: Positions) -> dict[str, Plane]:
        """One run of ids per position; nothing is drawn."""
        ranks = ranks_of(signal.ids_N, np.full(signal.num_entries, -1, np.int32), self.order)
        order = np.lexsort((ranks, signal.rows_N))
        rows, splits = signal.rows_N, positions.splits
        roots = np.exp(signal.logprobs_N[order].astype(np.float64) / 2)
        codes = np.minimum(np.rint(roots * VALUE_STEPS), VALUE_STEPS).astype(np.uint8)
        rest = rest_codes(signal.rest_S)
        classes = value_classes(rest, signal.entries_S)
        planes = {
            **encode_shorts("entries", signal.entries_S, splits),
            **encode_shorts("rest", rest, splits),
            **encode_shorts("id", gaps_of(ranks[order], rows), signal.indptr[splits]),
        }
        for index in range(CLASSES):
            of = classes[rows] == index
            planes[f"value/{index}"] = Plane(codes[of], np.searchsorted(rows[of], splits))
        return planes

    def decode_entries(self, planes: Planes, previous_S: NDArray[np.int32]) -> SparseSignal:
        """Entries scaled to a sum of one minus the rest."""
        S = len(previous_S)
        lengths = decode_shorts(planes, "entries", length=S).astype(np.int64)
        codes_S = decode_shorts(planes, "rest", length=S, none=True)
        nowhere = np.full(S, -1, np.int32)
        ids = decode_runs(planes, "id", lengths_R=lengths, previous_R=nowhere, order=self.order)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        values = _values(planes, value_classes(codes_S, lengths), indptr)
        ids_N, values_N = sort_entries(ids, values, indptr)
        rest = rest_values(codes_S)
        return SparseSignal.from_arrays(
            self.selection, indptr, ids_N, scaled_logprobs(values_N, indptr, rest), rest_S=rest
        )


def value_classes(rest_S: NDArray[np.integer], entries_S: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [S] 0 … 7: which value plane a position has, from its rest's code and entries.

    About log(entries) minus the log-odds of the rest, in steps of a nat; in integers, so that every
    reader agrees.
    """
    bits = np.frexp(entries_S.astype(np.float64))[1].astype(np.int64)
    peaked = np.where(rest_S == MISSING, 0, rest_S.astype(np.int64) - REST_EVEN)
    flat = 11 * bits - peaked
    return np.clip((flat + _CLASS_START) // _CLASS_STEP, 0, CLASSES - 1)


def _values(
    planes: Planes, classes_S: NDArray[np.int64], indptr: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """uint8 [N] value codes of all classes, in order of position."""
    codes = np.empty(int(indptr[-1]), dtype=np.uint8)
    classes_N = np.repeat(classes_S.astype(np.uint8), np.diff(indptr))
    for index in range(CLASSES):
        of, data = classes_N == index, planes[f"value/{index}"].data
        expect_length(f"value/{index}", data, int(np.count_nonzero(of)))
        codes[of] = data
    if len(codes) and int(codes.max()) > VALUE_STEPS:
        raise CorruptShardError(
            "unknown value code", expected=f"at most {VALUE_STEPS}", got=int(codes.max())
        )
    return codes


def scaled_logprobs(
    codes_N: NDArray[np.uint8], indptr: NDArray[np.int64], rest_S: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64 [N] log-probabilities of value codes, scaled so that entries and rest sum to one."""
    totals = segment_sum(_TABLE[codes_N], indptr)
    kept = -np.expm1(rest_S)
    scale = np.log(kept, where=kept > 0, out=np.full_like(kept, -np.inf))
    scale -= np.log(totals, where=totals > 0, out=np.zeros_like(totals))
    return np.asarray(_LOG_TABLE[codes_N] + np.repeat(scale, np.diff(indptr)))


def rest_codes(rest_S: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64 [S]: minus the log-odds of the rest to the nearest 1/32, ``MISSING`` for no rest.

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
