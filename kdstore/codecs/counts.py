"""Codec of counts: exact integers, one per entry."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import SignalCodec
from kdstore.codecs.gaps import NAME as GAP
from kdstore.codecs.gaps import ascending, decode_ids, encode_ids, sort_runs
from kdstore.codecs.options import option
from kdstore.codecs.planes import (
    Plane,
    Planes,
    byte_width,
    expect_length,
    join_integers,
    plane_names,
    split_integers,
)
from kdstore.errors import CorruptShardError, KDStoreError, SignalError
from kdstore.hashing import RowKeys
from kdstore.signal import SparseSignal, segment_sum


class CountsCodec(SignalCodec):
    """Planes ``entries*``, ``count*`` (both as wide as n needs) and ``gap*``."""

    name = "counts/1"

    @property
    def rounds(self) -> int:
        """n, the number of multinomial rounds."""
        return int(option(self.selection, "n"))

    @property
    def entry_planes(self) -> tuple[str, ...]:
        """Names of the planes."""
        width = byte_width(self.rounds)
        return (
            *plane_names("entries", width),
            *plane_names("count", width),
            *plane_names(GAP, byte_width(self.order.vocab_size - 1)),
        )

    def encode_entries(
        self, signal: SparseSignal, keys: RowKeys, splits: NDArray[np.int64]
    ) -> dict[str, Plane]:
        """Exact counts; SignalError unless they sum to n at each position."""
        del keys
        counts = self._checked_counts(signal)
        order = sort_runs(signal.ids_N, signal.rows_N, self.order)
        starts = signal.indptr[:-1][signal.entries_S > 0]
        entry_splits = signal.indptr[splits]
        width = byte_width(self.rounds)
        return {
            **split_integers("entries", signal.entries_S, width=width, splits=splits),
            **split_integers("count", counts[order], width=width, splits=entry_splits),
            **encode_ids(signal.ids_N[order], starts, order=self.order, splits=entry_splits),
        }

    def decode_entries(self, planes: Planes, num_scored: int) -> SparseSignal:
        """Entries whose probability is count / n."""
        width = byte_width(self.rounds)
        lengths = join_integers(planes, "entries", width=width)
        expect_length("entries", lengths, num_scored)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        counts = join_integers(planes, "count", width=width)
        expect_length("count", counts, int(indptr[-1]))
        self._check_total(counts, indptr, CorruptShardError)
        ids = decode_ids(planes, lengths, order=self.order)
        sort = ascending(ids, indptr, self.order.vocab_size)
        logprobs = np.log(counts[sort] / self.rounds)
        return SparseSignal.from_arrays(
            self.selection, indptr, ids[sort], logprobs, counts_N=counts[sort]
        )

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
