"""Token ids as runs of ascending ranks in the store's id order, gap-coded.

A run belongs to one position. It is coded as its first rank, then rank minus the rank before it
minus one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.jit import kernel
from kdstore.codecs.order import IdOrder
from kdstore.codecs.planes import Planes
from kdstore.codecs.shorts import decode_shorts
from kdstore.errors import CorruptShardError, SignalError


def ranks_of(
    ids_N: NDArray[np.int32], previous_N: NDArray[np.int32], order: IdOrder
) -> NDArray[np.int64]:
    """int64 [N]: rank of each id after its previous token (-1: as after a token never seen).

    Raises SignalError for an id outside the vocabulary.
    """
    check_ids(ids_N, order.vocab_size)
    ranks = np.empty(len(ids_N), dtype=np.int64)
    by_id, place = order.successors.by_id
    _ranks(ids_N, previous_N, order.rank_of_V, order.successors.first_V1, by_id, place, ranks)
    return ranks


def check_ids(ids_N: NDArray[np.int32], vocab_size: int) -> None:
    """SignalError for an id outside the vocabulary."""
    if len(ids_N) and not (int(ids_N.min()) >= 0 and int(ids_N.max()) < vocab_size):
        raise SignalError(
            "token id outside the store's vocabulary",
            expected=f"0 to {vocab_size - 1}",
            got=f"{int(ids_N.min())} to {int(ids_N.max())}",
            todo="vocab_size is the width of the teacher's logits, not of the tokenizer",
        )


def gaps_of(ranks_N: NDArray[np.int64], runs_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [N] gaps of ranks that are in order of run, then of rank."""
    gaps = np.diff(ranks_N, prepend=0) - 1
    first = np.diff(runs_N, prepend=-1) != 0
    gaps[first] = ranks_N[first]
    return gaps


def decode_runs(
    planes: Planes,
    name: str,
    *,
    lengths_R: NDArray[np.int64],
    previous_R: NDArray[np.int32],
    order: IdOrder,
) -> NDArray[np.int32]:
    """int32 [N] ids of the runs of a stream; CorruptShardError if a rank leaves the vocabulary."""
    gaps = decode_shorts(planes, name, length=int(lengths_R.sum()))
    ids = np.empty(len(gaps), dtype=np.int32)
    following = order.successors
    bad = _ids(gaps, lengths_R, previous_R, order.id_of_V, following.first_V1, following.ids_P, ids)
    if bad >= 0:
        raise CorruptShardError(
            f"an id of plane {name!r} lies outside the vocabulary",
            expected=f"ids below {order.vocab_size}",
            got=f"a larger rank in run {bad}",
        )
    return ids


@kernel
def _ranks(
    ids: NDArray[Any],
    previous: NDArray[Any],
    rank_of: NDArray[Any],
    first: NDArray[Any],
    by_id: NDArray[Any],
    place: NDArray[Any],
    ranks: NDArray[Any],
) -> None:
    for i in range(len(ids)):
        p = previous[i]
        low, end = np.int64(0), np.int64(0)
        if 0 <= p < len(rank_of):
            low, end = first[p], first[p + 1]
        count, high = end - low, end
        while low < high:
            middle = (low + high) >> 1
            if by_id[middle] < ids[i]:
                low = middle + 1
            else:
                high = middle
        if low < end and by_id[low] == ids[i]:
            ranks[i] = place[low]
        else:
            ranks[i] = count + rank_of[ids[i]]


@kernel
def _ids(
    gaps: NDArray[Any],
    lengths: NDArray[Any],
    previous: NDArray[Any],
    id_of: NDArray[Any],
    first: NDArray[Any],
    successors: NDArray[Any],
    ids: NDArray[Any],
) -> int:
    """The first run with a rank beyond the vocabulary, or -1."""
    at = 0
    for run in range(len(lengths)):
        p = previous[run]
        low, count = np.int64(0), np.int64(0)
        if 0 <= p < len(id_of):
            low = first[p]
            count = first[p + 1] - low
        rank = np.int64(-1)
        for i in range(at, at + lengths[run]):
            rank += np.int64(gaps[i]) + 1
            if rank < count:
                ids[i] = successors[low + rank]
            elif rank < count + len(id_of):
                ids[i] = id_of[rank - count]
            else:
                return run
        at += lengths[run]
    return -1
