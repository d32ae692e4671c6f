"""Codec of counts: exact integers.

The ids drawn once, more than half of them, need no count: they are a run of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import Positions, SignalCodec
from kdstore.codecs.ids import grouped_runs, read_runs
from kdstore.codecs.jit import kernel
from kdstore.codecs.options import option
from kdstore.codecs.planes import Plane, Planes
from kdstore.codecs.shorts import decode_shorts, encode_shorts, short_names
from kdstore.errors import CorruptShardError, SignalError
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
        groups = grouped_runs(
            signal.ids_N,
            signal.indptr,
            (counts == 1).astype(np.uint8),
            2,
            previous_S=positions.previous_S,
            order=self.order,
        )
        planes: dict[str, Plane] = {}
        for name, group in zip(_GROUPS, groups, strict=True):
            planes |= encode_shorts(f"{name}s", group.lengths_S, splits)
            planes |= encode_shorts(name, group.gaps_G, group.bounds(splits))
        repeated = groups[0]
        values = counts[repeated.entries_G] - 2
        return planes | encode_shorts("count", values, repeated.bounds(splits))

    def decode_entries(self, planes: Planes, previous_S: NDArray[np.int32]) -> SparseSignal:
        """Entries whose probability is count / n."""
        S = len(previous_S)
        lengths = [decode_shorts(planes, f"{name}s", length=S) for name in _GROUPS]
        lengths_GS = np.stack(lengths).astype(np.int64)
        indptr, ids_N, places_N = read_runs(
            planes, _GROUPS, lengths_GS, previous_S=previous_S, order=self.order
        )
        repeated = decode_shorts(planes, "count", length=int(lengths_GS[0].sum()))
        counts_N = np.empty(len(ids_N), dtype=np.int32)
        bad = _place_counts(indptr, places_N, lengths_GS[0], repeated, self.rounds, counts_N)
        if bad >= 0:
            raise CorruptShardError(
                "counts of a position do not sum to n",
                where=f"position {bad}",
                expected=self.rounds,
            )
        logprobs = np.log(np.arange(1, counts_N.max(initial=1) + 1) / self.rounds)[counts_N - 1]
        return SparseSignal.from_arrays(self.selection, indptr, ids_N, logprobs, counts_N=counts_N)

    def _checked_counts(self, signal: SparseSignal) -> NDArray[np.int64]:
        if signal.counts_N is None:
            raise SignalError("a counts signal needs counts_N", got=None)
        counts = signal.counts_N.astype(np.int64)
        totals = segment_sum(counts, signal.indptr)
        bad = np.flatnonzero(totals != self.rounds)
        if len(bad) or (counts < 1).any():
            raise SignalError(
                "counts of a position do not sum to n",
                where=f"position {bad[0]} of the signal" if len(bad) else None,
                expected=f"positive counts that sum to {self.rounds}",
                got=totals[bad[:1]].tolist() or int(counts.min()),
            )
        return counts


@kernel
def _place_counts(
    indptr: NDArray[Any],
    places_N: NDArray[Any],
    repeats_S: NDArray[Any],
    repeated: NDArray[Any],
    rounds: int,
    counts_N: NDArray[Any],
) -> int:
    """The first position whose counts do not sum to ``rounds``, or -1."""
    at = 0
    for s in range(len(repeats_S)):
        first_single = indptr[s] + repeats_S[s]
        left = rounds - (indptr[s + 1] - first_single)
        for j in range(indptr[s], first_single):
            count = int(repeated[at]) + 2
            counts_N[indptr[s] + places_N[j]] = count
            left -= count
            at += 1
        for j in range(first_single, indptr[s + 1]):
            counts_N[indptr[s] + places_N[j]] = 1
        if left != 0:
            return s
    return -1
