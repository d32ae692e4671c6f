"""Sorting the few entries of one position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.jit import kernel
from kdstore.errors import CorruptShardError

_INSERTION = 32  # beyond this many keys a quicksort is faster


@kernel
def sort_keys(keys: NDArray[Any], length: int) -> None:
    """Sorts the first ``length`` int64 keys in place."""
    if length > _INSERTION:
        keys[:length].sort()
        return
    for i in range(1, length):
        key = keys[i]
        j = i - 1
        while j >= 0 and keys[j] > key:
            keys[j + 1] = keys[j]
            j -= 1
        keys[j + 1] = key


def sort_entries(
    ids_N: NDArray[np.int32], payload_N: NDArray[np.uint8], indptr: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Entries of each position ascending by id, with the byte that each carries.

    Positions of equal length are sorted together, row by row of a matrix, which numpy does in
    vector instructions. Raises CorruptShardError if a position has an id twice.
    """
    keys_N = ids_N.astype(np.int64) << 8 | payload_N
    lengths = np.diff(indptr)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        if length and len(rows) == len(lengths):
            keys_N.reshape(-1, length).sort(axis=1)
        elif length > 1:
            entries = indptr[rows][:, None] + np.arange(length)
            keys_N[entries] = np.sort(keys_N[entries], axis=1)
    ids = (keys_N >> 8).astype(np.int32)
    again = np.diff(ids) <= 0
    again[indptr[1:-1][(indptr[1:-1] > 0) & (indptr[1:-1] < len(ids))] - 1] = False
    if again.any():
        raise CorruptShardError("a position has the same token id twice", expected="distinct ids")
    return ids, keys_N.astype(np.uint8)


def merge_groups(
    lengths: Sequence[NDArray[np.int64]], ids: Sequence[NDArray[np.int32]]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """``indptr`` and ids of two groups of runs put together, ascending by id in each position.

    The last array [N] says where each entry was in the groups laid end to end. Raises
    CorruptShardError if a position has an id twice.
    """
    indptr = np.concatenate([[0], np.cumsum(lengths[0] + lengths[1])])
    out = np.empty(indptr[-1], dtype=np.int32)
    slots = np.empty(indptr[-1], dtype=np.int64)
    bad = _merge(indptr, lengths[0], ids[0], ids[1], out, slots)
    if bad >= 0:
        raise CorruptShardError(
            "a position has the same token id twice",
            where=f"position {bad}",
            expected="distinct ids",
        )
    return indptr, out, slots


@kernel
def _merge(
    indptr: NDArray[Any],
    lengths: NDArray[Any],
    one: NDArray[Any],
    other: NDArray[Any],
    ids: NDArray[Any],
    slots: NDArray[Any],
) -> int:
    longest = 0
    for s in range(len(lengths)):
        longest = max(longest, indptr[s + 1] - indptr[s])
    keys = np.empty(longest, dtype=np.int64)
    at_one, at_other = 0, 0
    for s in range(len(lengths)):
        n = indptr[s + 1] - indptr[s]
        for j in range(lengths[s]):
            keys[j] = np.int64(one[at_one]) << 32 | at_one
            at_one += 1
        for j in range(lengths[s], n):
            keys[j] = np.int64(other[at_other]) << 32 | (len(one) + at_other)
            at_other += 1
        sort_keys(keys, n)
        last = np.int64(-1)
        for j in range(n):
            token = keys[j] >> 32
            if token == last:
                return s
            ids[indptr[s] + j], last = token, token
            slots[indptr[s] + j] = keys[j] & 0xFFFFFFFF
    return -1
