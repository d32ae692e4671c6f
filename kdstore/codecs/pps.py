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

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import Positions, SignalCodec
from kdstore.codecs.ids import WRONG, Group, grouped_runs, refuse
from kdstore.codecs.options import option
from kdstore.codecs.planes import FreshMemory, Plane, Planes, expect_length
from kdstore.codecs.pps_kernels import (
    BAD_EXACT,
    LEFT_OUT,
    MANY,
    OFF_GRID,
    UNITS,
    decode_positions,
    read_counts,
    round_positions,
)
from kdstore.codecs.shorts import encode_shorts, read_stream, short_names
from kdstore.errors import CorruptShardError, SignalError
from kdstore.hashing import Purpose, RowKeys
from kdstore.signal import SparseSignal

MIN_TAU = 1e-4  # 10,000 entries a position
_REFUSED = {
    1: ("tail entries of a position have different weights", "one weight"),
    2: ("the entries of a position leave nothing to the largest", "entries that sum to one"),
}
_RUNS = ("top", "head", "tail")
_WRONG = {
    **WRONG,
    OFF_GRID: ("a code lies outside its grid", "positive weights that leave the largest some"),
    BAD_EXACT: ("exact values are no log-probabilities", "values that leave the largest some"),
}


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
        group_N, code_N, weight_S, exact_S = self._rounded(signal, tail_N, positions.keys)
        top, head, tail = grouped_runs(
            signal.ids_N,
            signal.indptr,
            group_N,
            LEFT_OUT,
            previous_S=positions.previous_S,
            order=self.order,
        )
        weighted = (top.lengths_S > 0) & (tail.lengths_S > 0)
        coded = ~np.repeat(exact_S, head.lengths_S)
        splits = positions.splits
        return {
            **_count_planes(top.lengths_S + head.lengths_S, tail.lengths_S, exact_S, splits),
            **encode_shorts("top", top.gaps_G, top.bounds(splits)),
            **encode_shorts("head", head.gaps_G, head.bounds(splits)),
            **encode_shorts("tail", tail.gaps_G, tail.bounds(splits)),
            **encode_shorts(
                "value",
                code_N[head.entries_G[coded]],
                _bounds(np.where(exact_S, 0, head.lengths_S))[splits],
            ),
            "weight": Plane(weight_S[weighted & ~exact_S], _bounds(weighted & ~exact_S)[splits]),
            "exact": _exact_plane(signal.logprobs_N, exact_S, head, tail, splits),
        }

    def _rounded(
        self, signal: SparseSignal, tail_N: NDArray[np.bool_], keys: RowKeys
    ) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.uint8], NDArray[np.bool_]]:
        """Groups of the entries, codes of the heads, codes of the weights, exact positions."""
        group_N = np.empty(signal.num_entries, dtype=np.uint8)
        code_N = np.empty(signal.num_entries, dtype=np.int32)
        weight_S = np.zeros(len(signal), dtype=np.uint8)
        exact_S = np.zeros(len(signal), dtype=np.bool_)
        status, row = round_positions(
            signal.indptr,
            signal.logprobs_N,
            tail_N,
            keys.uniform(Purpose.VALUE_ROUNDING)[:, 0],
            keys.uniform(Purpose.WEIGHT_ROUNDING)[:, 0],
            self.tau,
            group_N,
            code_N,
            weight_S,
            exact_S,
        )
        if status:
            what, expected = _REFUSED[status]
            raise SignalError(what, where=f"position {row} of the signal", expected=expected)
        return group_N, code_N, weight_S, exact_S

    def decode_entries(
        self, planes: Planes, previous_S: NDArray[np.int32], memory: FreshMemory
    ) -> SparseSignal:
        """Entries that sum to one; ``tail_N`` marks the sampled ones."""
        indptr, stored = _read_counts(planes, len(previous_S))
        with np.errstate(divide="ignore"):
            log_counts = np.log(np.arange(stored[-1] + 1))
        entries = memory.empty(int(indptr[-1]), "<i4", "<f4", "?")
        status, row = decode_positions(
            planes["counts"].data,
            planes["more"].data,
            previous_S,
            (self.order.token_of, self.order.successors.first_V1),
            tuple(read_stream(planes, name) for name in _RUNS),
            read_stream(planes, "value"),
            planes["weight"].data,
            np.frombuffer(planes["exact"].data, dtype="<f4"),
            (*self._log_masses, log_counts),
            indptr,
            entries,
        )
        refuse(status, row, _WRONG)
        ids_N, logprobs_N, tail_N = entries
        return SparseSignal.from_arrays(self.selection, indptr, ids_N, logprobs_N, tail_N=tail_N)

    @cached_property
    def _log_masses(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logs of k units of mass, and of one minus k units while that is positive."""
        mass = np.arange(int(np.ceil(UNITS / self.tau))) * (self.tau / UNITS)
        with np.errstate(divide="ignore"):
            return np.log(mass), np.log1p(-mass)


def _checked_tail(signal: SparseSignal) -> NDArray[np.bool_]:
    if signal.tail_N is None:
        raise SignalError("a pps signal needs tail_N", expected="bool [N]", got=None)
    if (signal.entries_S == 0).any():
        raise SignalError("a position has no entry", expected="entries that sum to one", got=0)
    return signal.tail_N


def _count_planes(
    heads_S: NDArray[np.int64],
    tails_S: NDArray[np.int64],
    exact_S: NDArray[np.bool_],
    splits: NDArray[np.int64],
) -> dict[str, Plane]:
    """A byte each; 0 for an exact position. ``more`` holds uint16 of what a nibble cannot."""
    both = np.stack([heads_S, tails_S], axis=1)
    nibbles = np.minimum(both, MANY) @ [16, 1]
    codes = np.where(exact_S, 0, nibbles).astype(np.uint8)
    start = np.where(exact_S, 0, MANY)
    stored = exact_S[:, None] | (both >= MANY)
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


def _read_counts(planes: Planes, num_scored: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``indptr``, and what is stored, as ``read_counts`` gives it."""
    codes, more = planes["counts"].data, planes["more"].data
    expect_length("counts", codes, num_scored)
    indptr = np.zeros(num_scored + 1, dtype=np.int64)
    stored = np.zeros(7, dtype=np.int64)
    if read_counts(codes, more, indptr, stored) != len(more):
        raise CorruptShardError(
            "planes 'counts' and 'more' disagree",
            expected="at least one entry a position, and counts that say what 'more' holds",
        )
    for name, length in zip((*_RUNS, "value", "weight"), stored.tolist(), strict=False):
        expect_length(name, planes[name].data, length)
    expect_length("exact", planes["exact"].data, 4 * int(stored[5]))
    return indptr, stored


def _exact_plane(
    logprobs_N: NDArray[np.float32],
    exact_S: NDArray[np.bool_],
    head: Group,
    tail: Group,
    splits: NDArray[np.int64],
) -> Plane:
    """float32 of each head but the largest, then of one tail entry, of exact positions."""
    first_S = np.flatnonzero(exact_S & (tail.lengths_S > 0))
    rows = np.repeat(np.arange(len(exact_S)), np.where(exact_S, head.lengths_S, 0))
    heads = head.entries_G[np.repeat(exact_S, head.lengths_S)]
    tails = tail.entries_G[_bounds(tail.lengths_S)[first_S]]
    order = np.argsort(np.concatenate([rows, first_S]), kind="stable")
    values = logprobs_N[np.concatenate([heads, tails])[order]].astype("<f4")
    lengths = np.where(exact_S, head.lengths_S + (tail.lengths_S > 0), 0)
    return Plane(values.view(np.uint8), 4 * _bounds(lengths)[splits])


def _bounds(lengths_S: NDArray[Any]) -> NDArray[np.int64]:
    """int64 [S+1]: where each position begins, from lengths or flags."""
    return np.concatenate([[0], np.cumsum(lengths_S, dtype=np.int64)])
