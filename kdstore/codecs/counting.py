"""Counting a source's tokens and pairs of tokens, of which its id order is made."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.order import IdOrder, Successors

PAIR_TOKENS = 1 << 24  # pairs are counted in the first 16 Mi tokens, so that memory is bounded
_BATCH = 1 << 20


class OrderBuilder:
    """Token counts of a source, sample by sample, then its id order.

    >>> builder = OrderBuilder(vocab_size=4)
    >>> builder.add(np.array([2, 1, 2, 1, 3]))
    >>> builder.build().id_of_V.tolist()
    [1, 2, 3, 0]
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._counts_V: NDArray[np.int64] = np.zeros(vocab_size, dtype=np.int64)
        self._pairs: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._pair_counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._batch: list[NDArray[np.int64]] = []
        self._waiting = 0
        self._left = PAIR_TOKENS

    def add(self, input_ids_T: NDArray[np.integer]) -> None:
        """Count one sample; its ids are below the vocabulary's size."""
        ids = input_ids_T.astype(np.int64)
        np.add.at(self._counts_V, ids, 1)
        if self._left <= 0:
            return
        self._left -= len(ids)
        self._batch.append(ids[:-1] * self.vocab_size + ids[1:])
        self._waiting += len(ids)
        if self._waiting >= _BATCH:
            self._merge()

    def build(self) -> IdOrder:
        """The order of everything added."""
        self._merge()
        following = Successors.from_counts(self._pairs, self._pair_counts, self.vocab_size)
        return IdOrder.from_counts(self._counts_V, following)

    def _merge(self) -> None:
        batch = np.concatenate([self._pairs[:0], *self._batch])
        pairs, counts = np.unique(batch, return_counts=True)
        both, inverse = np.unique(np.concatenate([self._pairs, pairs]), return_inverse=True)
        totals = np.bincount(inverse, weights=np.concatenate([self._pair_counts, counts]))
        self._pairs, self._pair_counts = both, totals.astype(np.int64)
        self._batch, self._waiting = [], 0
