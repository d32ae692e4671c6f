"""Shuffled batches of a store, in an order that is a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdstore.errors import UsageError
from kdstore.readers.cache import READ_AHEAD
from kdstore.readers.collate import Batch, Collator
from kdstore.readers.sampler import draw_of_epoch, epoch_order

if TYPE_CHECKING:
    from kdstore.readers.store import Store
    from kdstore.sample import Sample


@dataclass(frozen=True)
class Loader:
    """Batches of ``batch_tokens`` tokens at most, or of ``batch_size`` samples.

    A padded batch counts its padding. A sample longer than ``batch_tokens`` is a batch of its own.
    Every sample comes once an epoch, with ``draw`` of its signal: by default epoch e reads draw
    e mod ``store.num_draws``.
    """

    store: Store
    batch_tokens: int | None = None
    batch_size: int | None = None
    pack: bool = False
    pad_id: int = 0
    seed: int = 0
    epochs: int = 1
    shuffle: bool = True
    draw: int | None = None

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
        if self.shuffle:
            return epoch_order(self.store, seed=self.seed, epoch=epoch)
        return np.arange(len(self.store), dtype=np.int64)

    def _groups(self, epoch: int) -> Iterator[list[Sample]]:
        group: list[Sample] = []
        longest = total = 0
        for sample in self._samples(epoch):
            longest, total = max(longest, sample.num_tokens), total + sample.num_tokens
            if group and self._is_over(len(group) + 1, longest, total):
                yield group
                group, longest, total = [], sample.num_tokens, sample.num_tokens
            group.append(sample)
        if group:
            yield group

    def _samples(self, epoch: int) -> Iterator[Sample]:
        draw = draw_of_epoch(self.store, epoch) if self.draw is None else self.draw
        order = self.order(epoch).tolist()
        for start in range(0, len(order), READ_AHEAD):
            yield from self.store.__getitems__(
                [(index, draw) for index in order[start : start + READ_AHEAD]]
            )

    def _is_over(self, samples: int, longest: int, total: int) -> bool:
        if self.batch_tokens is None:
            return samples > (self.batch_size or 1)
        return (total if self.pack else longest * samples) > self.batch_tokens
