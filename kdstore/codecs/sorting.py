"""Sorting the few entries of one position."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.jit import i64, inlined, kernel, u

_COUNTING = 512  # beyond this many ids sorting is faster than comparing all with all
_LANES = 64
_PAST = np.int32((1 << 31) - 1)


@kernel
def id_buffers(indptr: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Memory for the ids of the longest position and their places, in whole vectors."""
    longest = 0
    for s in range(len(indptr) - 1):
        longest = max(longest, indptr[s + 1] - indptr[s])
    size = (longest + _LANES - 1) // _LANES * _LANES
    return np.empty(size, dtype=np.int32), np.empty(size, dtype=np.int32)


@inlined
def place(ids: NDArray[Any], length: int, places: NDArray[Any]) -> bool:
    """Where each of the first ``length`` int32 ids belongs in ascending order.

    False if an id comes twice. Counting the smaller ids compares each with all, but without a
    branch and a vector at a time. Both arrays come from ``id_buffers``.
    """
    if length > _COUNTING:
        return _place_many(ids, length, places)
    width = (length + _LANES - 1) // _LANES * _LANES
    for j in range(length, width):
        ids[u(j)] = _PAST
    for i in range(length):
        places[u(i)] = 0
    for first in range(0, width, _LANES):
        block = ids[first : first + _LANES]
        for i in range(length):
            smaller, token = np.int32(0), ids[u(i)]
            for j in range(_LANES):  # a constant number, or it is compiled without vectors
                smaller += np.int32(block[j] < token)
            places[u(i)] += smaller
    total = 0
    for i in range(length):
        total += i64(places[u(i)])
    return total == length * (length - 1) // 2


@kernel
def _place_many(ids: NDArray[Any], length: int, places: NDArray[Any]) -> bool:
    keys = np.empty(length, dtype=np.int64)
    for i in range(length):
        keys[i] = i64(ids[i]) << 32 | i
    keys.sort()
    for j in range(length):
        places[keys[j] & 0xFFFFFFFF] = j
        if j and keys[j] >> 32 == keys[j - 1] >> 32:
            return False
    return True
