"""Codec of counts: exact integers.

The ids drawn once, more than half of them, need no count: they are a run of their own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import Positions, SignalCodec
from kdstore.codecs.ids import decode_runs, gaps_of, ranks_of
from kdstore.codecs.options import option
from kdstore.codecs.planes import Plane, Planes
from kdstore.codecs.shorts import decode_shorts, encode_shorts, short_names
from kdstore.codecs.sorting import merge_groups
from kdstore.errors import CorruptShardError, KDStoreError, SignalError
from kdstore.signal import SparseSignal, segment_sum

MAX_ROUNDS = 1 << 20
_GROUPS = ("repeat", "single")  # ids drawn more than once, and once


class CountsCodec(SignalCodec):
    """Shorts ``repeats`` and ``singles`` (how many), ``repeat`` and ``single`` (ids), ``count``.

    ``count`` holds each repeated id's count minus two.
    """

    name = "counts/1"

    @property
    def rounds(self) -> int:
        """n, the number of multinomial rounds."""
        return int(option(self.selection, "n", low=1, high=MAX_ROUNDS))

    @property
    def entry_planes(self) -> tuple[str, ...]:
        """Names of the planes."""
        return short_names("repeats", "singles", *_GROUPS, "count")

    def encode_entries(self, signal: SparseSignal, positions: Positions) -> dict[str, Plane]:
        """Exact counts; SignalError unless they sum to n at each position."""
        counts, splits = self._checked_counts(signal), positions.splits
        group_N = (counts == 1).astype(np.int64)
        runs = signal.rows_N * 2 + group_N
        ranks = ranks_of(signal.ids_N, positions.previous_S[signal.rows_N], self.order)
        order = np.lexsort((ranks, runs))
        gaps, rows, group = gaps_of(ranks[order], runs[order]), signal.rows_N[order], group_N[order]
        planes: dict[str, Plane] = {}
        for which, name in enumerate(_GROUPS):
            of = group == which
            lengths = np.bincount(rows[of], minlength=len(signal))
            planes |= encode_shorts(f"{name}s", lengths, splits)
            planes |= encode_shorts(name, gaps[of], np.searchsorted(rows[of], splits))
        repeated = group == 0
        values = counts[order][repeated] - 2
        return planes | encode_shorts("count", values, np.searchsorted(rows[repeated], splits))

    def decode_entries(self, planes: Planes, previous_S: NDArray[np.int32]) -> SparseSignal:
        """Entries whose probability is count / n."""
        S = len(previous_S)
        lengths = [decode_shorts(planes, f"{name}s", length=S).astype(np.int64) for name in _GROUPS]
        ids = [
            decode_runs(planes, name, lengths_R=length, previous_R=previous_S, order=self.order)
            for name, length in zip(_GROUPS, lengths, strict=True)
        ]
        counts = decode_shorts(planes, "count", length=len(ids[0])).astype(np.int64) + 2
        indptr, ids_N, slots = merge_groups(lengths, ids)
        counts_N = np.concatenate([counts, np.ones(len(ids[1]), np.int64)])[slots]
        self._check_total(counts_N, indptr, CorruptShardError)
        logprobs = np.log(counts_N / self.rounds)
        return SparseSignal.from_arrays(self.selection, indptr, ids_N, logprobs, counts_N=counts_N)

    def _checked_counts(self, signal: SparseSignal) -> NDArray[np.int64]:
        if signal.counts_N is None:
            raise SignalError("a counts signal needs counts_N", got=None)
        counts = signal.counts_N.astype(np.int64)
        self._check_total(counts, signal.indptr, SignalError)
        return counts

    def _check_total(
        self, counts: NDArray[np.int64], indptr: NDArray[np.int64], error: type[KDStoreError]
    ) -> None:
        totals = segment_sum(counts, indptr)
        bad = np.flatnonzero(totals != self.rounds)
        if len(bad) or (counts < 1).any():
            raise error(
                "counts of a position do not sum to n",
                where=f"position {bad[0]} of the signal" if len(bad) else None,
                expected=f"positive counts that sum to {self.rounds}",
                got=totals[bad[:1]].tolist() or int(counts.min()),
            )
