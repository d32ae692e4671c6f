"""Token ids as runs of ascending ranks in the store's id order, gap-coded.

A run belongs to one position. It is coded as its first rank, then rank minus the rank before it
minus one. A position may have several runs, one of each group of its entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.jit import i64, inlined, kernel, u
from kdstore.codecs.order import IdOrder, slot_of
from kdstore.codecs.shorts import ONE, read_long
from kdstore.codecs.sorting import id_buffers, place
from kdstore.errors import CorruptShardError, SignalError

_RANK_BITS = 28  # ranks stay below twice the vocabulary, groups below eight
_RANK = (1 << _RANK_BITS) - 1
NOWHERE = -1  # a previous token that is none: ranks go by the whole vocabulary
BAD_RANK, TWICE, UNUSED, NEXT_STATUS = range(1, 5)  # what a decoding kernel finds wrong
WRONG = {
    BAD_RANK: ("an id outside the vocabulary, or too few extra bytes", "ranks of the id order"),
    TWICE: ("a position has the same token id twice", "distinct ids"),
    UNUSED: ("a plane has more extra bytes than its codes ask for", "extra bytes that are used"),
}


class Group(NamedTuple):
    """The runs of one group of entries, those of all positions end to end.

    * ``gaps_G`` int32: each entry's coded rank
    * ``entries_G`` int32: which entry of the signal it is
    * ``lengths_S`` int64: how many of them each position has
    """

    gaps_G: NDArray[np.int32]
    entries_G: NDArray[np.int32]
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
    gaps, entries = np.empty((2, len(ids_N)), dtype=np.int32)
    lengths = np.zeros((len(sizes), len(indptr) - 1), dtype=np.int64)
    following = order.successors
    ranks = (order.rank_of_V, following.first_V1, *following.places)
    _group(ids_N, indptr, group_N, previous_S, ranks, starts[:-1].copy(), gaps, entries, lengths)
    return [
        Group(gaps[start:end], entries[start:end], lengths[index])
        for index, (start, end) in enumerate(pairwise(starts))
    ][:num_groups]


def refuse(status: int, row: int, wrong: Mapping[int, tuple[str, str]] = WRONG) -> None:
    """CorruptShardError for what a decoding kernel found wrong at a position; none for status 0."""
    if status:
        what, expected = wrong[status]
        raise CorruptShardError(what, where=f"position {row}", expected=expected)


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
    rank_of, first, followers, place_of = ranks
    keys, places = id_buffers(indptr)
    at_place = np.empty(len(keys), dtype=np.int64)
    for s in range(len(indptr) - 1):
        start, n = indptr[s], indptr[s + 1] - indptr[s]
        low, count = successors_of(previous[s], first)
        for j in range(n):
            token = i64(ids[u(start + j)])
            rank = count + rank_of[u(token)]
            if count:
                slot = slot_of(token, low, count, followers)
                if followers[u(slot)] >= 0:
                    rank = i64(place_of[u(slot)])
            keys[u(j)] = i64(group[u(start + j)]) << _RANK_BITS | rank
        place(keys, n, places)
        for j in range(n):
            at_place[u(places[u(j)])] = j
        before, of = -1, -1
        for i in range(n):
            j = at_place[u(i)]
            g, rank = keys[u(j)] >> _RANK_BITS, i64(keys[u(j)]) & _RANK
            if g != of:
                before, of = -1, g
            gaps[u(cursor[u(g)])] = rank - before - 1
            entries[u(cursor[u(g)])] = start + j
            cursor[u(g)] += 1
            lengths[u(g), u(s)] += 1
            before = rank


@inlined
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
    """Fills ``ids[start : start + length]``; the next extra byte, or -1 if a rank is none.

    ``stream`` has codes, of which there must be enough, and extra bytes; ``token_of`` is
    ``IdOrder.token_of``; ``low`` and ``count`` come from ``successors_of``.
    """
    codes, extra = stream
    beyond = len(token_of) - vocab_size - count
    rank = -1
    for i in range(length):
        gap = i64(codes[u(at + i)])
        if gap >= ONE:
            gap, at_extra = read_long(gap, extra, at_extra)
            if gap < 0:
                return -1
        rank += gap + 1
        if rank - count >= vocab_size:
            return -1
        ids[u(start + i)] = token_of[u(rank + (low if rank < count else beyond))]
    return at_extra


@kernel
def successors_of(previous: int, first_V1: NDArray[Any]) -> tuple[int, int]:
    """Where the successors of a token begin, and how many there are."""
    if 0 <= previous < len(first_V1) - 1:
        low = first_V1[previous]
        return low, first_V1[previous + 1] - low
    return 0, 0
