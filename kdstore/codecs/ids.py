"""Token ids as runs of ascending ranks in the store's id order, gap-coded.

A run belongs to one position. It is coded as its first rank, then rank minus the rank before it
minus one. A position may have several runs, one of each group of its entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.jit import kernel
from kdstore.codecs.order import IdOrder, slot_of
from kdstore.codecs.planes import Planes, expect_length
from kdstore.codecs.shorts import ONE, read_long, read_stream
from kdstore.codecs.sorting import id_buffers, place
from kdstore.errors import CorruptShardError, SignalError

_RANK_BITS = 28  # ranks stay below twice the vocabulary, groups below eight
_RANK = (1 << _RANK_BITS) - 1
NOWHERE = -1  # a previous token that is none: ranks go by the whole vocabulary


_WRONG = {
    0: ("not all extra bytes are used", "as many as the codes ask for"),
    1: ("a rank outside the id order, or too few extra bytes,", "ranks within the vocabulary"),
    2: ("a position has the same token id twice", "distinct ids"),
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


def read_runs(
    planes: Planes,
    names: Sequence[str],
    lengths_GS: NDArray[np.int64],
    *,
    previous_S: NDArray[np.int32],
    order: IdOrder,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """``indptr``, int32 [N] ids ascending in each position, and int32 [N] where entries went.

    A position's entries are read group by group, each group's by rank; in the order of ids the j-th
    that is read is its ``places_N[indptr[s] + j]``-th. Raises CorruptShardError if the streams
    ``names`` do not hold runs of ``lengths_GS``, or an id outside the vocabulary or twice.
    """
    for name, lengths_S in zip(names, lengths_GS, strict=True):
        expect_length(name, planes[name].data, int(lengths_S.sum()))
    streams = [read_stream(planes, name) for name in names]
    ends = np.cumsum([(0, 0), *((len(codes), len(extra)) for codes, extra in streams)], axis=0)
    cursors = ends[:-1].copy()
    indptr = np.concatenate([[0], np.cumsum(lengths_GS.sum(axis=0))])
    ids_N, places_N = np.empty((2, indptr[-1]), dtype=np.int32)
    status, row = _read(
        indptr,
        lengths_GS,
        np.concatenate([codes for codes, _ in streams]),
        np.concatenate([extra for _, extra in streams]),
        cursors,
        previous_S,
        (order.token_of, order.successors.first_V1),
        ids_N,
        places_N,
    )
    if status or (cursors != ends[1:]).any():
        what, expected = _WRONG[status]
        raise CorruptShardError(
            f"{what} in planes {', '.join(names)}",
            where=f"position {row}" if status else None,
            expected=expected,
        )
    return indptr, ids_N, places_N


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
        low, count = _successors(previous[s], first)
        for j in range(n):
            token = int(ids[start + j])
            rank = count + rank_of[token]
            if count:
                slot = slot_of(token, low, count, followers)
                if followers[slot] >= 0:
                    rank = int(place_of[slot])
            keys[j] = int(group[start + j]) << _RANK_BITS | rank
        place(keys, n, places)
        for j in range(n):
            at_place[places[j]] = j
        before, of = -1, -1
        for i in range(n):
            j = at_place[i]
            g, rank = keys[j] >> _RANK_BITS, int(keys[j]) & _RANK
            if g != of:
                before, of = -1, g
            gaps[cursor[g]] = rank - before - 1
            entries[cursor[g]] = start + j
            cursor[g] += 1
            lengths[g, s] += 1
            before = rank


@kernel
def _read(
    indptr: NDArray[Any],
    lengths_GS: NDArray[Any],
    codes: NDArray[Any],
    extra: NDArray[Any],
    cursors_G2: NDArray[Any],
    previous_S: NDArray[Any],
    order: tuple[NDArray[Any], ...],
    ids_N: NDArray[Any],
    places_N: NDArray[Any],
) -> tuple[int, int]:
    """Status (0: fine, else see ``_WRONG``) and position; moves the cursors behind what is read."""
    token_of, first = order
    V, P = len(first) - 1, len(token_of) - len(first) + 1
    ids, places = id_buffers(indptr)
    for s in range(len(indptr) - 1):
        start, n = indptr[s], 0
        low, count = _successors(previous_S[s], first)
        for g in range(len(lengths_GS)):
            at, at_extra = cursors_G2[g, 0], cursors_G2[g, 1]
            rank, length = -1, lengths_GS[g, s]
            for i in range(length):
                gap = int(codes[at + i])
                if gap >= ONE:
                    gap, at_extra = read_long(gap, extra, at_extra)
                    if gap < 0:
                        return 1, s
                rank += gap + 1
                if rank - count >= V:
                    return 1, s
                ids[n + i] = token_of[rank + (low if rank < count else P - count)]
            cursors_G2[g, 0], cursors_G2[g, 1] = at + length, at_extra
            n += length
        if not place(ids, n, places):
            return 2, s
        for j in range(n):
            ids_N[start + places[j]] = ids[j]
            places_N[start + j] = places[j]
    return 0, 0


@kernel
def _successors(previous: int, first_V1: NDArray[Any]) -> tuple[int, int]:
    """Where the successors of a token begin, and how many there are."""
    if 0 <= previous < len(first_V1) - 1:
        low = first_V1[previous]
        return low, first_V1[previous + 1] - low
    return 0, 0
