"""Codec of pps: an unbiased rounding that keeps the sum at one.

A position is written as its largest head entry, the other head entries and the tail, each a run of
ids of its own. The largest has no value: it decodes as one minus all the others, so nothing can
miss the sum. The other heads lie on a grid of half the selection's tau, the tail's mass on one of a
third of it, both rounded up or down at random so that every expectation is exact; a head that is
rounded to zero, or a lone tail token, is left out. Errors of a step cost less than 5 % of the
variance that the sampling has anyway.

The heads of a position share one uniform (systematic rounding), so the largest is off by less than
one step of each grid. Where even that could leave it nothing, or where the tail's mass does not lie
where pps puts it, the position's values are stored exactly (decided before drawing).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import Positions, SignalCodec
from kdstore.codecs.ids import decode_runs, gaps_of, ranks_of
from kdstore.codecs.options import option
from kdstore.codecs.planes import Plane, Planes, expect_length
from kdstore.codecs.pps_kernels import (
    DROPPED,
    MANY,
    UNITS,
    assemble,
    count_entries,
    round_positions,
)
from kdstore.codecs.shorts import decode_shorts, encode_shorts, short_names
from kdstore.errors import CorruptShardError, SignalError
from kdstore.hashing import Purpose, RowKeys
from kdstore.signal import SparseSignal

MIN_TAU = 1e-4  # 10,000 entries a position
_TOP, _HEAD, _TAIL = 0, 1, 2
_REFUSED = {
    1: ("tail entries of a position have different weights", "one weight"),
    2: ("the entries of a position leave nothing to the largest", "entries that sum to one"),
}
_WRONG = {
    1: ("a code lies outside its grid", "codes of positive weights"),
    2: ("decoded entries sum to more than one", "something left for the largest"),
    3: ("an exact value is no log-probability", "finite values at most 0"),
    4: ("a position has the same token id twice", "distinct ids"),
}


class _Counts(NamedTuple):
    """Heads and tails of each position, and which of them are stored exactly."""

    heads_S: NDArray[np.int64]
    tails_S: NDArray[np.int64]
    exact_S: NDArray[np.bool_]


class PPSCodec(SignalCodec):
    """Planes ``counts``, ``more``, ``weight``, ``exact``; shorts ``top head tail value``.

    ``counts`` holds heads * 16 + tails, ``more`` what does not fit there; ``weight`` is the grid
    code of the tail's mass, ``value`` that of each head but the largest.
    """

    name = "pps/1"

    @property
    def tau(self) -> float:
        """The selection's tau: the largest weight of a tail entry."""
        return option(self.selection, "tau", low=MIN_TAU, high=1)

    @property
    def entry_planes(self) -> tuple[str, ...]:
        """Names of the planes."""
        return (
            *("counts", "more"),
            *short_names("top", "head", "tail", "value"),
            *("weight", "exact"),
        )

    def encode_entries(self, signal: SparseSignal, positions: Positions) -> dict[str, Plane]:
        """Rounded values; what is rounded to zero is not stored."""
        tail_N = _checked_tail(signal)
        code_N, weight_S, exact_S, top_S = self._rounded(signal, tail_N, positions.keys)
        kept = np.flatnonzero(code_N != DROPPED)
        group_N = np.where(tail_N, _TAIL, _HEAD)
        group_N[top_S[top_S >= 0]] = _TOP
        rows, group = signal.rows_N[kept], group_N[kept]
        ranks = ranks_of(signal.ids_N[kept], positions.previous_S[rows], self.order)
        runs = rows * 3 + group
        order = np.lexsort((ranks, runs))
        kept, rows, group = kept[order], rows[order], group[order]
        gaps = gaps_of(ranks[order], runs[order])
        counts = _Counts(
            np.bincount(rows[group != _TAIL], minlength=len(signal)),
            np.bincount(rows[group == _TAIL], minlength=len(signal)),
            exact_S,
        )
        planes = _count_planes(counts, positions.splits)
        for name, which in (("top", _TOP), ("head", _HEAD), ("tail", _TAIL)):
            of = group == which
            planes |= encode_shorts(name, gaps[of], _splits(rows[of], positions.splits))
        coded = (group == _HEAD) & ~exact_S[rows]
        planes |= encode_shorts(
            "value", code_N[kept[coded]], _splits(rows[coded], positions.splits)
        )
        weighted = np.flatnonzero((counts.heads_S > 0) & (counts.tails_S > 0) & ~exact_S)
        planes["weight"] = Plane(weight_S[weighted], _splits(weighted, positions.splits))
        stored = exact_S[rows] & (group != _TOP)
        stored &= (group == _HEAD) | (np.diff(rows * 3 + group, prepend=-1) != 0)
        values = signal.logprobs_N[kept[stored]].astype("<f4").view(np.uint8)
        planes["exact"] = Plane(values, 4 * _splits(rows[stored], positions.splits))
        return planes

    def _rounded(
        self, signal: SparseSignal, tail_N: NDArray[np.bool_], keys: RowKeys
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_], NDArray[np.int64]]:
        """Codes of the entries, codes of the weights, exact positions, largest heads (or -1)."""
        code_N = np.zeros(signal.num_entries, dtype=np.int64)
        weight_S = np.zeros(len(signal), dtype=np.uint8)
        exact_S = np.zeros(len(signal), dtype=np.bool_)
        top_S = np.full(len(signal), -1, dtype=np.int64)
        status, row = round_positions(
            signal.indptr,
            signal.logprobs_N,
            tail_N,
            keys.uniform(Purpose.VALUE_ROUNDING)[:, 0],
            keys.uniform(Purpose.WEIGHT_ROUNDING)[:, 0],
            self.tau,
            code_N,
            weight_S,
            exact_S,
            top_S,
        )
        if status:
            what, expected = _REFUSED[status]
            raise SignalError(what, where=f"position {row} of the signal", expected=expected)
        return code_N, weight_S, exact_S, top_S

    def decode_entries(self, planes: Planes, previous_S: NDArray[np.int32]) -> SparseSignal:
        """Entries that sum to one; ``tail_N`` marks the sampled ones."""
        S = len(previous_S)
        counts = _read_counts(planes, S)
        headed = counts.heads_S > 0
        heads = counts.heads_S - headed
        ids = tuple(
            decode_runs(planes, name, lengths_R=lengths, previous_R=previous_S, order=self.order)
            for name, lengths in (
                ("top", headed.astype(np.int64)),
                ("head", heads),
                ("tail", counts.tails_S),
            )
        )
        codes = decode_shorts(planes, "value", length=int(heads[~counts.exact_S].sum()))
        weighted = headed & (counts.tails_S > 0)
        weights = planes["weight"].data
        expect_length("weight", weights, int((weighted & ~counts.exact_S).sum()))
        exact = planes["exact"].data
        expect_length("exact", exact, 4 * int((heads + weighted)[counts.exact_S].sum()))
        indptr = np.concatenate([[0], np.cumsum(counts.heads_S + counts.tails_S)])
        out_ids = np.empty(indptr[-1], dtype=np.int32)
        logprobs = np.empty(indptr[-1], dtype=np.float32)
        tail = np.empty(indptr[-1], dtype=np.bool_)
        values = (codes, weights, np.ascontiguousarray(exact).view("<f4").astype(np.float32))
        tables = self._tables(int(counts.tails_S.max(initial=0)))
        status, row = assemble(indptr, counts, ids, values, tables, out_ids, logprobs, tail)
        if status:
            what, expected = _WRONG[status]
            raise CorruptShardError(what, where=f"position {row}", expected=expected)
        return SparseSignal.from_arrays(self.selection, indptr, out_ids, logprobs, tail_N=tail)

    def _tables(self, most_tails: int) -> tuple[NDArray[np.float64], ...]:
        """Logs of k units of mass, of one minus k units while that is positive, and of counts."""
        mass = np.arange(int(np.ceil(UNITS / self.tau))) * (self.tau / UNITS)
        with np.errstate(divide="ignore"):
            return np.log(mass), np.log1p(-mass), np.log(np.arange(most_tails + 1))


def _checked_tail(signal: SparseSignal) -> NDArray[np.bool_]:
    if signal.tail_N is None:
        raise SignalError("a pps signal needs tail_N", expected="bool [N]", got=None)
    if (signal.entries_S == 0).any():
        raise SignalError("a position has no entry", expected="entries that sum to one", got=0)
    return signal.tail_N


def _count_planes(counts: _Counts, splits: NDArray[np.int64]) -> dict[str, Plane]:
    """A byte each; 0 for an exact position. ``more`` holds uint16 of what a nibble cannot."""
    nibbles = np.minimum(counts.heads_S, MANY) * 16 + np.minimum(counts.tails_S, MANY)
    codes = np.where(counts.exact_S, 0, nibbles).astype(np.uint8)
    start = np.where(counts.exact_S, 0, MANY)
    both = np.stack([counts.heads_S, counts.tails_S], axis=1)
    stored = counts.exact_S[:, None] | (both >= MANY)
    beyond = (both - start[:, None])[stored]
    if len(beyond) and int(beyond.max()) >= 1 << 16:
        raise SignalError(
            "a position has too many entries",
            expected="at most 65,550 heads or tails",
            got=both.max(),
        )
    ends = np.concatenate([[0], np.cumsum(2 * stored.sum(axis=1))])
    more = beyond.astype("<u2").view(np.uint8)
    return {"counts": Plane(codes, splits), "more": Plane(more, ends[splits])}


def _read_counts(planes: Planes, num_scored: int) -> _Counts:
    codes, more = planes["counts"].data, planes["more"].data
    expect_length("counts", codes, num_scored)
    counts = _Counts(
        np.empty(num_scored, dtype=np.int64),
        np.empty(num_scored, dtype=np.int64),
        np.empty(num_scored, dtype=np.bool_),
    )
    if count_entries(codes, more, *counts) != len(more):
        raise CorruptShardError(
            "planes 'counts' and 'more' disagree",
            expected="at least one entry a position, and counts that say what 'more' holds",
        )
    return counts


def _splits(rows: NDArray[np.int64], splits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where samples begin among ascending position rows."""
    return np.searchsorted(rows, splits).astype(np.int64)
