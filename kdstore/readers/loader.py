"""Shuffled batches of a store, in an order that is a pure function of seed and epoch.

Row groups are shuffled, then the samples within windows of a few of them: a sample costs the
reading of its row group, and only a few stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdstore.errors import UsageError
from kdstore.hashing import Purpose, hash_fields
from kdstore.readers.collate import Batch, Collator
from kdstore.readers.store import CACHED_ROW_GROUPS

if TYPE_CHECKING:
    from kdstore.readers.store import Store
    from kdstore.sample import Sample

WINDOW = CACHED_ROW_GROUPS


@dataclass(frozen=True)
class Loader:
    """Batches of ``batch_tokens`` tokens at most, or of ``batch_size`` samples.

    A padded batch counts its padding. A sample longer than ``batch_tokens`` is a batch of its own.
    Every sample comes once an epoch.
    """

    store: Store
    batch_tokens: int | None = None
    batch_size: int | None = None
    pack: bool = False
    pad_id: int = 0
    seed: int = 0
    epochs: int = 1
    shuffle: bool = True

    def __post_init__(self) -> None:
        if (self.batch_tokens is None) == (self.batch_size is None):
            raise UsageError(
                "a loader needs one of batch_tokens and batch_size",
                got=f"batch_tokens={self.batch_tokens}, batch_size={self.batch_size}",
            )

    def __iter__(self) -> Iterator[Batch]:
        collate = Collator(pack=self.pack, pad_id=self.pad_id)
        for epoch in range(self.epochs):
            for samples in self._groups(epoch):
                yield collate(samples)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """int64: the store's indices in the order of an epoch."""
        if not self.shuffle:
            return np.arange(len(self.store), dtype=np.int64)
        blocks = self.store.row_groups()
        shuffled = [blocks[index] for index in self._shuffled(np.arange(len(blocks)), epoch)]
        windows = [
            np.concatenate([np.arange(*block) for block in shuffled[start : start + WINDOW]])
            for start in range(0, len(shuffled), WINDOW)
        ]
        nothing = np.zeros(0, dtype=np.int64)
        return np.concatenate([nothing, *(self._shuffled(window, epoch) for window in windows)])

    def _shuffled(self, indices: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        keys = hash_fields(self.seed, epoch, int(Purpose.ORDER), indices)
        return indices[np.argsort(keys, kind="stable")]

    def _groups(self, epoch: int) -> Iterator[list[Sample]]:
        group: list[Sample] = []
        for index in self.order(epoch):
            sample = self.store[int(index)]
            if group and self._is_full([*group, sample]):
                yield group
                group = []
            group.append(sample)
        if group:
            yield group

    def _is_full(self, group: list[Sample]) -> bool:
        if self.batch_size is not None:
            return len(group) > self.batch_size
        lengths = [sample.num_tokens for sample in group]
        size = sum(lengths) if self.pack else max(lengths) * len(lengths)
        return size > (self.batch_tokens or 0)
