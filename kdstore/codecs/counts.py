"""Codec of counts: exact integers.

The ids drawn once, more than half of them, need no count: they are a run of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import Positions, SignalCodec
from kdstore.codecs.ids import (
    BAD_RANK,
    NEXT_STATUS,
    TWICE,
    UNUSED,
    WRONG,
    grouped_runs,
    read_run,
    refuse,
    successors_of,
)
from kdstore.codecs.jit import i64, kernel, u
from kdstore.codecs.options import option
from kdstore.codecs.planes import FreshMemory, Plane, Planes, expect_length
from kdstore.codecs.shorts import decode_shorts, encode_shorts, read_stream, short_names
from kdstore.codecs.sorting import id_buffers, place
from kdstore.errors import SignalError
from kdstore.signal import SparseSignal, segment_sum

MAX_ROUNDS = 1 << 20
_GROUPS = ("repeat", "single")  # ids drawn more than once, and once
BAD_SUM = NEXT_STATUS
_WRONG = {**WRONG, BAD_SUM: ("counts of a position do not sum to n", "n draws")}


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

    def decode_entries(
        self, planes: Planes, previous_S: NDArray[np.int32], memory: FreshMemory
    ) -> SparseSignal:
        """Entries whose probability is count / n."""
        S = len(previous_S)
        lengths = [decode_shorts(planes, f"{name}s", length=S) for name in _GROUPS]
        lengths_GS = np.stack(lengths).astype(np.int64)
        for name, lengths_S in zip(_GROUPS, lengths_GS, strict=True):
            expect_length(name, planes[name].data, int(lengths_S.sum()))
        repeated = decode_shorts(planes, "count", length=int(lengths_GS[0].sum()))
        indptr = np.concatenate([[0], np.cumsum(lengths_GS.sum(axis=0))])
        ids_N, counts_N, logprobs_N = memory.empty(int(indptr[-1]), "<i4", "<i4", "<f4")
        status, row = _decode(
            lengths_GS,
            previous_S,
            (self.order.token_of, self.order.successors.first_V1),
            tuple(read_stream(planes, name) for name in _GROUPS),
            repeated,
            self.rounds,
            indptr,
            ids_N,
            counts_N,
        )
        refuse(status, row, _WRONG)
        table = np.log(np.arange(1, counts_N.max(initial=1) + 1) / self.rounds)
        logprobs_N[:] = table.astype(np.float32)[counts_N - 1]
        return SparseSignal.from_arrays(
            self.selection, indptr, ids_N, logprobs_N, counts_N=counts_N
        )

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
def _decode(
    lengths_GS: NDArray[Any],
    previous_S: NDArray[Any],
    order: tuple[NDArray[Any], ...],
    runs: tuple[tuple[NDArray[Any], ...], ...],
    repeated: NDArray[Any],
    rounds: int,
    indptr: NDArray[Any],
    ids_N: NDArray[Any],
    counts_N: NDArray[Any],
) -> tuple[int, int]:
    """Status (0: fine, else see ``_WRONG``) and position; fills the entries in order of id."""
    (token_of, first), (repeat, single) = order, runs
    ids, places = id_buffers(indptr)
    at, at_single, extra, single_extra, V = 0, 0, 0, 0, len(first) - 1
    for s in range(len(previous_S)):
        repeats, singles = lengths_GS[0, s], lengths_GS[1, s]
        low, count = successors_of(previous_S[s], first)
        extra = read_run(repeat, at, extra, repeats, token_of, V, low, count, ids, 0)
        single_extra = read_run(
            single, at_single, single_extra, singles, token_of, V, low, count, ids, repeats
        )
        if extra < 0 or single_extra < 0:
            return BAD_RANK, s
        if not place(ids, repeats + singles, places):
            return TWICE, s
        left = rounds - singles
        for j in range(repeats + singles):
            slot = indptr[s] + places[u(j)]
            drawn = i64(repeated[u(at + j)]) + 2 if j < repeats else 1
            ids_N[u(slot)], counts_N[u(slot)] = ids[u(j)], drawn
            left -= drawn if j < repeats else 0
        if left != 0:
            return BAD_SUM, s
        at, at_single = at + repeats, at_single + singles
    used = extra == len(repeat[1]) and single_extra == len(single[1])
    return (0 if used else UNUSED), len(previous_S)
