"""The order of samples: a pure function of store, seed and epoch.

Row groups are shuffled, then the samples within windows of a few of them: a sample costs the
reading of its row group, and only a few stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kdstore.hashing import Purpose, hash_fields
from kdstore.readers.cache import CACHED_ROW_GROUPS

if TYPE_CHECKING:
    from kdstore.readers.store import Index, Store


def epoch_order(store: Store, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """int64: the store's indices in the shuffled order of an epoch, each once."""

    def shuffled(indices: NDArray[np.int64], purpose: Purpose) -> NDArray[np.int64]:
        keys = hash_fields(seed, epoch, int(purpose), indices)
        return indices[np.argsort(keys, kind="stable")]

    groups = store.row_groups()
    group_order = shuffled(np.arange(len(groups)), Purpose.GROUP_ORDER)
    parts = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(groups), CACHED_ROW_GROUPS):
        window = [np.arange(*groups[g]) for g in group_order[start : start + CACHED_ROW_GROUPS]]
        parts.append(shuffled(np.concatenate(window), Purpose.ORDER))
    return np.concatenate(parts)


def draw_of_epoch(store: Store, epoch: int) -> int:
    """The draw that an epoch reads: each in turn."""
    return epoch % store.num_draws


class EpochSampler(torch.utils.data.Sampler["Index"]):
    """``epoch_order`` as the sampler of a torch DataLoader; ``set_epoch`` names the epoch.

    Of a store with several draws it gives (index, draw), with the epoch's draw.
    """

    def __init__(self, store: Store, *, seed: int) -> None:
        self.store, self.seed, self.epoch = store, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration; transformers and accelerate call this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.store)

    def __iter__(self) -> Iterator[Index]:
        indices = epoch_order(self.store, seed=self.seed, epoch=self.epoch).tolist()
        if self.store.num_draws == 1:
            return iter(indices)
        draw = draw_of_epoch(self.store, self.epoch)
        return ((index, draw) for index in indices)
