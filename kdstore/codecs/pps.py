"""Codec of pps: an unbiased rounding that keeps the sum at one.

A position is written as its largest head entry, the other head entries and the tail, each group
ascending by rank. Stored are the tail weight and the other heads, rounded stochastically in
probability; the largest decodes as one minus all of that, so nothing can miss the sum and every
expectation is exact. Where rounding everything up could leave nothing to the largest, or where a
head lies below the lowest level, the position is stored exactly instead (decided before drawing).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import SignalCodec
from kdstore.codecs.gaps import NAME as GAP
from kdstore.codecs.gaps import ascending, decode_ids, encode_ids, sort_runs
from kdstore.codecs.grid import probability_grid
from kdstore.codecs.options import option
from kdstore.codecs.planes import (
    Plane,
    Planes,
    byte_width,
    expect_length,
    float_planes,
    float_values,
    join_integers,
    plane_names,
    split_integers,
)
from kdstore.errors import CorruptShardError, SignalError
from kdstore.hashing import Purpose, RowKeys
from kdstore.signal import SparseSignal, segment_sum

_GRID = probability_grid()
EXACT = 255
_LARGEST, _OTHER, _TAIL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class _Rounded:
    """What a position's values become: codes, and which positions are exact."""

    exact_S: NDArray[np.bool_]
    weight_code_S: NDArray[np.int64]
    other_code_N: NDArray[np.int64]


class PPSCodec(SignalCodec):
    """Planes ``heads*``, ``tails*``, ``weight``, ``value``, ``exact*`` and ``gap*``.

    ``weight`` is the tail weight's code (255: the position is exact), ``value`` one code per head
    but the largest, ``exact*`` the float32 log tail weight and log head values of exact positions.
    """

    name = "pps/1"

    @property
    def _count_width(self) -> int:
        return byte_width(int(np.ceil(2 / option(self.selection, "tau"))) + 64)

    @property
    def entry_planes(self) -> tuple[str, ...]:
        """Names of the planes; their number follows from tau and the vocabulary's width."""
        return (
            *plane_names("heads", self._count_width),
            *plane_names("tails", self._count_width),
            "weight",
            "value",
            *plane_names("exact", 4),
            *plane_names(GAP, byte_width(self.order.vocab_size - 1)),
        )

    def encode_entries(
        self, signal: SparseSignal, keys: RowKeys, splits: NDArray[np.int64]
    ) -> dict[str, Plane]:
        """Stochastically rounded values; a weight rounded to zero drops the position's tail."""
        tail_N = _checked_tail(signal)
        group_N = np.where(tail_N, _TAIL, _OTHER)
        group_N[_largest_heads(signal, tail_N)] = _LARGEST
        log_weight_S = _log_weights(signal, tail_N)
        rounded = _round(signal, group_N, log_weight_S, keys)
        heads_S = segment_sum((~tail_N).astype(np.int64), signal.indptr)
        dropped_S = (rounded.weight_code_S == 0) & (heads_S > 0) & ~rounded.exact_S
        stored_N = ~(tail_N & dropped_S[signal.rows_N])
        tails_S = segment_sum((tail_N & stored_N).astype(np.int64), signal.indptr)
        return self._planes(
            signal, group_N, stored_N, rounded, log_weight_S, heads_S, tails_S, splits
        )

    def _planes(
        self,
        signal: SparseSignal,
        group_N: NDArray[np.int64],
        stored_N: NDArray[np.bool_],
        rounded: _Rounded,
        log_weight_S: NDArray[np.float64],
        heads_S: NDArray[np.int64],
        tails_S: NDArray[np.int64],
        splits: NDArray[np.int64],
    ) -> dict[str, Plane]:
        kept = np.flatnonzero(stored_N)
        runs = signal.rows_N[kept] * 3 + group_N[kept]
        order = sort_runs(signal.ids_N[kept], runs, self.order)
        kept, runs = kept[order], runs[order]
        starts = np.flatnonzero(np.diff(runs, prepend=-1))
        rows, other = signal.rows_N[kept], group_N[kept] == _OTHER
        exact_N = rounded.exact_S[rows]
        coded = other & ~exact_N
        weight = np.where(rounded.exact_S, EXACT, rounded.weight_code_S)
        width = self._count_width
        return {
            **split_integers("heads", heads_S, width=width, splits=splits),
            **split_integers("tails", tails_S, width=width, splits=splits),
            "weight": Plane(weight.astype(np.uint8), splits),
            "value": Plane(
                rounded.other_code_N[kept][coded].astype(np.uint8), _splits(rows[coded], splits)
            ),
            **_exact_planes(signal, kept[other & exact_N], rounded.exact_S, log_weight_S, splits),
            **encode_ids(
                signal.ids_N[kept], starts, order=self.order, splits=_splits(rows, splits)
            ),
        }

    def decode_entries(self, planes: Planes, num_scored: int) -> SparseSignal:
        """Entries that sum to one; ``tail_N`` marks the sampled ones."""
        heads = join_integers(planes, "heads", width=self._count_width)
        tails = join_integers(planes, "tails", width=self._count_width)
        weight_code = planes["weight"].data
        for name, data in (("heads", heads), ("tails", tails), ("weight", weight_code)):
            expect_length(name, data, num_scored)
        if ((heads + tails) == 0).any():
            raise CorruptShardError("a position has no entry", expected="at least one")
        largest = (heads > 0).astype(np.int64)
        run_lengths = np.stack([largest, heads - largest, tails], axis=1)
        ids = decode_ids(planes, run_lengths.reshape(-1), order=self.order)
        indptr = np.concatenate([[0], np.cumsum(heads + tails)])
        group = np.repeat(np.tile([_LARGEST, _OTHER, _TAIL], num_scored), run_lengths.reshape(-1))
        logprobs = _decode_values(planes, group, indptr, heads, tails)
        sort = ascending(ids, indptr, self.order.vocab_size)
        return SparseSignal.from_arrays(
            self.selection, indptr, ids[sort], logprobs[sort], tail_N=(group == _TAIL)[sort]
        )


def _checked_tail(signal: SparseSignal) -> NDArray[np.bool_]:
    if signal.tail_N is None:
        raise SignalError("a pps signal needs tail_N", expected="bool [N]", got=None)
    if (signal.entries_S == 0).any():
        raise SignalError("a position has no entry", expected="entries that sum to one", got=0)
    return signal.tail_N


def _largest_heads(signal: SparseSignal, tail_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Index of the largest head entry of each position that has one, the first of equals."""
    heads = np.flatnonzero(~tail_N)
    rows = signal.rows_N[heads]
    order = np.lexsort((heads, -signal.logprobs_N[heads], rows))
    first = np.flatnonzero(np.diff(rows[order], prepend=-1))
    return np.asarray(heads[order][first])


def _log_weights(signal: SparseSignal, tail_N: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Log tail weight of each position, -inf without a tail."""
    weights = np.full(len(signal), -np.inf)
    rows, values = signal.rows_N[tail_N], signal.logprobs_N[tail_N]
    weights[rows] = values
    if (weights[rows] != values).any():
        raise SignalError(
            "tail entries of a position have different weights", expected="one weight"
        )
    return weights


def _round(
    signal: SparseSignal,
    group_N: NDArray[np.int64],
    log_weight_S: NDArray[np.float64],
    keys: RowKeys,
) -> _Rounded:
    rows, weight = signal.rows_N, np.exp(log_weight_S)
    other = np.flatnonzero(group_N == _OTHER)
    value = np.exp(signal.logprobs_N[other].astype(np.float64))
    exact_S = _exact_positions(signal, rows[other], value, weight)
    codes = np.zeros(signal.num_entries, dtype=np.int64)
    draws = keys.uniform_at(
        Purpose.VALUE_ROUNDING, rows[other], signal.ids_N[other].astype(np.int64)
    )
    codes[other] = _GRID.stochastic(value, draws)
    weight_codes = _GRID.stochastic(weight, keys.uniform(Purpose.WEIGHT_ROUNDING)[:, 0])
    return _Rounded(exact_S, weight_codes, codes)


def _exact_positions(
    signal: SparseSignal,
    other_rows: NDArray[np.int64],
    other_values: NDArray[np.float64],
    weight_S: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Positions where the largest head could vanish, or another head could."""
    highest = signal.tail_counts_S * _GRID.levels[_GRID.below(weight_S) + 1]
    np.add.at(highest, other_rows, _GRID.levels[_GRID.below(other_values) + 1])
    has_head = signal.entries_S > signal.tail_counts_S
    exact = (highest > 1 - 1e-9) & has_head
    exact[other_rows[other_values < _GRID.levels[1]]] = True
    return np.asarray(exact)


def _exact_planes(
    signal: SparseSignal,
    others: NDArray[np.int64],
    exact_S: NDArray[np.bool_],
    log_weight_S: NDArray[np.float64],
    splits: NDArray[np.int64],
) -> dict[str, Plane]:
    """Of each exact position: its log tail weight, then the log values of its other heads."""
    positions = np.flatnonzero(exact_S)
    rows = np.concatenate([positions, signal.rows_N[others]])
    values = np.concatenate([log_weight_S[positions], signal.logprobs_N[others]])
    order = np.argsort(rows, kind="stable")
    return float_planes("exact", values[order].astype(np.float32), _splits(rows[order], splits))


def _splits(rows: NDArray[np.int64], splits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where samples begin among ascending position rows."""
    return np.searchsorted(rows, splits).astype(np.int64)


def _decode_values(
    planes: Planes,
    group_N: NDArray[np.int64],
    indptr: NDArray[np.int64],
    heads_S: NDArray[np.int64],
    tails_S: NDArray[np.int64],
) -> NDArray[np.float64]:
    rows = np.repeat(np.arange(len(heads_S)), np.diff(indptr))
    weight_code = planes["weight"].data.astype(np.int64)
    exact_S = weight_code == EXACT
    log_weight, log_exact = _split_exact(float_values(planes, "exact"), exact_S, heads_S)
    with np.errstate(divide="ignore"):
        log_table = np.log(_GRID.levels)
    codes = planes["value"].data.astype(np.int64)
    _check_codes(codes, weight_code[~exact_S], log_table)
    log_weight[~exact_S] = log_table[weight_code[~exact_S]]
    headless = heads_S == 0
    log_weight[headless] = -np.log(tails_S[headless])
    logprobs = log_weight[rows]
    coded = (group_N == _OTHER) & ~exact_S[rows]
    expect_length("value", codes, int(coded.sum()))
    logprobs[coded] = log_table[codes]
    logprobs[(group_N == _OTHER) & exact_S[rows]] = log_exact
    return _with_largest(logprobs, group_N, rows, indptr)


def _with_largest(
    logprobs: NDArray[np.float64],
    group_N: NDArray[np.int64],
    rows: NDArray[np.int64],
    indptr: NDArray[np.int64],
) -> NDArray[np.float64]:
    """The largest of each position filled in as what the others leave."""
    if not np.isfinite(logprobs[group_N != _LARGEST]).all():
        raise CorruptShardError("a decoded entry has no mass", expected="positive weights")
    largest = group_N == _LARGEST
    others = np.where(largest, 0.0, np.exp(logprobs))
    left = 1.0 - segment_sum(others, indptr)[rows[largest]]
    if (left <= 0).any():
        raise CorruptShardError("decoded entries sum to more than one", got=float(1 - left.min()))
    logprobs[largest] = np.log(left)
    return logprobs


def _split_exact(
    values: NDArray[np.float32], exact_S: NDArray[np.bool_], heads_S: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log tail weights [S] and log head values of the exact positions."""
    lengths = np.maximum(heads_S[exact_S], 1)
    expect_length("exact", values, int(lengths.sum()))
    first = np.zeros(len(values), dtype=bool)
    first[np.cumsum(lengths) - lengths] = True
    log_weight = np.full(len(exact_S), -np.inf)
    log_weight[exact_S] = values[first]
    return log_weight, values[~first].astype(np.float64)


def _check_codes(
    codes: NDArray[np.int64], weight_codes: NDArray[np.int64], table: NDArray[np.float64]
) -> None:
    for name, array in (("value", codes), ("weight", weight_codes)):
        if len(array) and int(array.max()) >= len(table):
            raise CorruptShardError(
                f"unknown code in plane {name!r}",
                expected=f"below {len(table)}",
                got=int(array.max()),
            )
