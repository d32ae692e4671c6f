"""Token ids as runs of ascending ranks in the store's id order, gap-coded.

A run belongs to one position. It is coded as its first rank, then rank minus the rank before it
minus one. A position may have several runs, one of each group of its entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.jit import kernel
from kdstore.codecs.order import IdOrder
from kdstore.codecs.shorts import ONE, read_long
from kdstore.codecs.sorting import sort_keys
from kdstore.errors import SignalError

NOWHERE = -1  # a previous token that is none: ranks go by the whole vocabulary


class Group(NamedTuple):
    """The runs of one group of entries, those of all positions end to end.

    * ``gaps_G`` int64: each entry's coded rank
    * ``entries_G`` int64: which entry of the signal it is
    * ``lengths_S`` int64: how many of them each position has
    """

    gaps_G: NDArray[np.int64]
    entries_G: NDArray[np.int64]
    lengths_S: NDArray[np.int64]

    def bounds(self, splits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the runs of the positions at ``splits`` begin."""
        return np.concatenate([[0], np.cumsum(self.lengths_S)])[splits]


def grouped_runs(
    ids_N: NDArray[np.int32],
    indptr: NDArray[np.int64],
    group_N: NDArray[np.uint8],
    num_groups: int,
    *,
    previous_S: NDArray[np.int32],
    order: IdOrder,
) -> list[Group]:
    """The runs of each group; an entry of a group that is not among them is left out.

    Raises SignalError for an id outside the vocabulary.
    """
    check_ids(ids_N, order.vocab_size)
    sizes = np.bincount(group_N, minlength=num_groups)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    gaps = np.empty(len(ids_N), dtype=np.int64)
    entries = np.empty(len(ids_N), dtype=np.int64)
    lengths = np.zeros((len(sizes), len(indptr) - 1), dtype=np.int64)
    by_id, place = order.successors.by_id
    ranks = (order.rank_of_V, order.successors.first_V1, by_id, place)
    _group(ids_N, indptr, group_N, previous_S, ranks, starts[:-1].copy(), gaps, entries, lengths)
    return [
        Group(gaps[start:end], entries[start:end], lengths[index])
        for index, (start, end) in enumerate(zip(starts, starts[1:], strict=False))
    ][:num_groups]


def check_ids(ids_N: NDArray[np.int32], vocab_size: int) -> None:
    """SignalError for an id outside the vocabulary."""
    if len(ids_N) and not (int(ids_N.min()) >= 0 and int(ids_N.max()) < vocab_size):
        raise SignalError(
            "token id outside the store's vocabulary",
            expected=f"0 to {vocab_size - 1}",
            got=f"{int(ids_N.min())} to {int(ids_N.max())}",
            todo="vocab_size is the width of the teacher's logits, not of the tokenizer",
        )


@kernel
def successors_of(previous: int, first_V1: NDArray[Any]) -> tuple[int, int]:
    """Where the successors of a token begin, and how many there are."""
    if 0 <= previous < len(first_V1) - 1:
        low = first_V1[previous]
        return low, first_V1[previous + 1] - low
    return np.int64(0), np.int64(0)


@kernel
def read_run(
    stream: tuple[NDArray[Any], ...],
    at: int,
    at_extra: int,
    length: int,
    token_of: NDArray[Any],
    vocab_size: int,
    low: int,
    count: int,
    ids: NDArray[Any],
    start: int,
) -> int:
    """Reads a run into ``ids[start:start + length]``; the next extra byte, or -1 for a bad rank.

    ``stream`` has codes and extra bytes, of which the codes are known to suffice. ``token_of`` is
    ``IdOrder.token_of``, ``low`` and ``count`` come from ``successors_of``.
    """
    codes, extra = stream
    beyond = len(token_of) - vocab_size - count
    rank = np.int64(-1)
    for i in range(length):
        gap = np.int64(codes[at + i])
        if gap >= ONE:
            gap, at_extra = read_long(gap, extra, at_extra)
            if gap < 0:
                return -1
        rank += gap + 1
        if rank - count >= vocab_size:
            return -1
        ids[start + i] = token_of[rank + (low if rank < count else beyond)]
    return at_extra


@kernel
def _rank(id: int, low: int, count: int, ranks: tuple[NDArray[Any], ...]) -> int:
    """An id's place among the successors, or beyond them its place in the vocabulary."""
    rank_of, _, by_id, place = ranks
    at, left = low, count
    while left > 1:  # without branches that a processor would guess wrong
        half = left >> 1
        at += half if by_id[at + half] <= id else 0
        left -= half
    if count and by_id[at] == id:
        return np.int64(place[at])
    return np.int64(count + rank_of[id])


@kernel
def _group(
    ids: NDArray[Any],
    indptr: NDArray[Any],
    group: NDArray[Any],
    previous: NDArray[Any],
    ranks: tuple[NDArray[Any], ...],
    cursor: NDArray[Any],
    gaps: NDArray[Any],
    entries: NDArray[Any],
    lengths: NDArray[Any],
) -> None:
    longest = 0
    for s in range(len(indptr) - 1):
        longest = max(longest, indptr[s + 1] - indptr[s])
    keys = np.empty(longest, dtype=np.int64)
    for s in range(len(indptr) - 1):
        start, n = indptr[s], indptr[s + 1] - indptr[s]
        low, count = successors_of(previous[s], ranks[1])
        for j in range(n):
            rank = _rank(ids[start + j], low, count, ranks)
            keys[j] = np.int64(group[start + j]) << 58 | rank << 30 | j
        sort_keys(keys, n)
        before, of = np.int64(-1), np.int64(-1)
        for j in range(n):
            g, rank = keys[j] >> 58, keys[j] >> 30 & 0xFFFFFFF
            if g != of:
                before, of = np.int64(-1), g
            gaps[cursor[g]] = rank - before - 1
            entries[cursor[g]] = start + (keys[j] & 0x3FFFFFFF)
            cursor[g] += 1
            lengths[g, s] += 1
            before = rank
