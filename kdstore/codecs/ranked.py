"""Codec of topk and topp: one value byte per entry, the rest as its own scalar.

A probability goes to the nearest of 128 levels of its cube root (0.57 of a nat of error beyond rank
25, but 1.4e-4 nats of KL: the levels are where the mass is). The lowest level decodes to a positive
floor. Decoding scales the entries so that they and the rest sum to one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import SignalCodec
from kdstore.codecs.gaps import NAME as GAP
from kdstore.codecs.gaps import ascending, decode_ids, encode_ids, sort_runs
from kdstore.codecs.grid import PROBABILITY_STEPS, cube_root_grid
from kdstore.codecs.planes import (
    Plane,
    Planes,
    byte_width,
    expect_length,
    join_integers,
    plane_names,
    split_integers,
)
from kdstore.errors import CorruptShardError, SignalError
from kdstore.hashing import RowKeys
from kdstore.signal import SparseSignal, segment_sum

_GRID = cube_root_grid()
FLOOR = (0.25 / PROBABILITY_STEPS) ** 3
_TABLE = np.concatenate([[FLOOR], _GRID.levels[1:] ** 3])
REST_STEP = 1 / 64
REST_ZERO = 65535
_REST_CENTRE = 32767


class RankedCodec(SignalCodec):
    """Planes ``entries*``, ``value``, ``rest*`` and ``gap*``."""

    name = "ranked/1"

    @property
    def entry_planes(self) -> tuple[str, ...]:
        """Names of the planes; their number follows from the vocabulary's width."""
        width = byte_width(self.order.vocab_size - 1)
        return (
            *plane_names("entries", byte_width(self.order.vocab_size)),
            "value",
            *plane_names("rest", 2),
            *plane_names(GAP, width),
        )

    def encode_entries(
        self, signal: SparseSignal, keys: RowKeys, splits: NDArray[np.int64]
    ) -> dict[str, Plane]:
        """One run of ids per position; nothing is drawn."""
        del keys
        order = sort_runs(signal.ids_N, signal.rows_N, self.order)
        starts = signal.indptr[:-1][signal.entries_S > 0]
        entry_splits = signal.indptr[splits]
        roots = np.exp(signal.logprobs_N[order].astype(np.float64) / 3)
        width = byte_width(self.order.vocab_size)
        return {
            **split_integers("entries", signal.entries_S, width=width, splits=splits),
            "value": Plane(_GRID.nearest(roots).astype(np.uint8), entry_splits),
            **split_integers("rest", rest_codes(signal.rest_S), width=2, splits=splits),
            **encode_ids(signal.ids_N[order], starts, order=self.order, splits=entry_splits),
        }

    def decode_entries(self, planes: Planes, num_scored: int) -> SparseSignal:
        """Entries scaled to a sum of one minus the rest."""
        lengths = join_integers(planes, "entries", width=byte_width(self.order.vocab_size))
        expect_length("entries", lengths, num_scored)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        codes = planes["value"].data
        expect_length("value", codes, int(indptr[-1]))
        rest = rest_values(join_integers(planes, "rest", width=2))
        expect_length("rest", rest, num_scored)
        ids = decode_ids(planes, lengths, order=self.order)
        logprobs = scaled_logprobs(codes, indptr, rest)
        sort = ascending(ids, indptr, self.order.vocab_size)
        return SparseSignal.from_arrays(
            self.selection, indptr, ids[sort], logprobs[sort], rest_S=rest
        )


def scaled_logprobs(
    codes_N: NDArray[np.uint8], indptr: NDArray[np.int64], rest_S: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64 [N] log-probabilities of value codes, scaled so that entries and rest sum to one."""
    if len(codes_N) and int(codes_N.max()) >= len(_TABLE):
        raise CorruptShardError(
            "unknown value code", expected=f"below {len(_TABLE)}", got=int(codes_N.max())
        )
    values = _TABLE[codes_N]
    totals = segment_sum(values, indptr)
    kept = -np.expm1(rest_S)
    scale = np.log(kept, where=kept > 0, out=np.full_like(kept, -np.inf))
    scale -= np.log(totals, where=totals > 0, out=np.zeros_like(totals))
    return np.asarray(np.log(values) + np.repeat(scale, np.diff(indptr)))


def rest_codes(rest_S: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64 [S]: log-odds of the rest to the nearest 1/64, 65535 for none.

    Log-odds keep both the rest and what it leaves to the entries away from zero.
    """
    rest = np.minimum(rest_S.astype(np.float64), -1e-12)
    if np.isnan(rest).any():
        raise SignalError("the rest is not a number", expected="log mass at most 0", got="NaN")
    finite = np.isfinite(rest)
    log_odds = np.where(finite, rest, -1.0)
    log_odds = log_odds - np.log(-np.expm1(log_odds))
    codes = np.clip(np.rint(log_odds / REST_STEP) + _REST_CENTRE, 0, REST_ZERO - 1)
    return np.where(finite, codes, REST_ZERO).astype(np.int64)


def rest_values(codes_S: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [S]: the log rest of each code."""
    log_odds = (codes_S - _REST_CENTRE) * REST_STEP
    return np.where(codes_S == REST_ZERO, -np.inf, -np.logaddexp(0.0, -log_odds))
