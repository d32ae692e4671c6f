"""Token ids as gaps between ascending ranks of the store's id order.

Ids come in runs (one or more per position), ascending by rank. A run is coded as its first rank,
then rank minus the rank before it minus one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.order import IdOrder
from kdstore.codecs.planes import Plane, Planes, byte_width, join_integers, split_integers
from kdstore.errors import CorruptShardError, SignalError

NAME = "gap"


def sort_runs(
    ids_N: NDArray[np.int32], runs_N: NDArray[np.int64], order: IdOrder
) -> NDArray[np.int64]:
    """int64 [N]: the permutation that puts entries in order of run, then of rank.

    Raises SignalError for an id outside the vocabulary.
    """
    if len(ids_N) and not (int(ids_N.min()) >= 0 and int(ids_N.max()) < order.vocab_size):
        raise SignalError(
            "token id outside the store's vocabulary",
            expected=f"0 to {order.vocab_size - 1}",
            got=f"{int(ids_N.min())} to {int(ids_N.max())}",
            todo="vocab_size is the width of the teacher's logits, not of the tokenizer",
        )
    keys = runs_N * order.vocab_size + order.rank_of_V[ids_N]
    return np.argsort(keys, kind="stable")


def encode_ids(
    ids_N: NDArray[np.int32],
    run_starts: NDArray[np.int64],
    *,
    order: IdOrder,
    splits: NDArray[np.int64],
) -> dict[str, Plane]:
    """Planes of ids that ``sort_runs`` put in order; ``run_starts`` indexes each run's first."""
    ranks = order.rank_of_V[ids_N].astype(np.int64)
    gaps = np.diff(ranks, prepend=0) - 1
    gaps[run_starts] = ranks[run_starts]
    return split_integers(NAME, gaps, width=byte_width(order.vocab_size - 1), splits=splits)


def decode_ids(
    planes: Planes, run_lengths: NDArray[np.int64], *, order: IdOrder
) -> NDArray[np.int32]:
    """int32 [N] ids of runs of the given lengths; CorruptShardError if a rank leaves V."""
    gaps = join_integers(planes, NAME, width=byte_width(order.vocab_size - 1))
    if len(gaps) != int(run_lengths.sum()):
        raise CorruptShardError(
            "ids and entry counts disagree", expected=int(run_lengths.sum()), got=len(gaps)
        )
    lengths = run_lengths[run_lengths > 0]
    starts = np.cumsum(lengths) - lengths
    climb = np.cumsum(gaps + 1)
    ranks = climb - np.repeat(climb[starts] - gaps[starts], lengths)
    if len(ranks) and int(ranks.max()) >= order.vocab_size:
        raise CorruptShardError(
            "a decoded id lies outside the vocabulary",
            expected=f"ranks below {order.vocab_size}",
            got=int(ranks.max()),
        )
    return np.asarray(order.id_of_V[ranks])


def ascending(
    ids_N: NDArray[np.int32], indptr: NDArray[np.int64], vocab_size: int
) -> NDArray[np.int64]:
    """int64 [N]: the permutation that sorts entries by position, then by token id.

    Raises CorruptShardError if a position has an id twice.
    """
    rows = np.repeat(np.arange(len(indptr) - 1, dtype=np.int64), np.diff(indptr))
    keys = rows * vocab_size + ids_N
    permutation = np.argsort(keys, kind="stable")
    if (np.diff(keys[permutation]) == 0).any():
        raise CorruptShardError("a position has the same token id twice", expected="distinct ids")
    return permutation
