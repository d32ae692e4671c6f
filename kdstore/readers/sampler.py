"""Samplers for a torch DataLoader: resumable batches, or single samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from kdstore.readers.batches import BatchConfig, BatchPlan
from kdstore.readers.mixture import parts_of
from kdstore.readers.planner import make_order
from kdstore.readers.ranks import rank_and_world_size
from kdstore.readers.sequence import BatchSequence

if TYPE_CHECKING:
    from kdstore.readers.mixture import Mixture
    from kdstore.readers.samples import Index, Samples


class BatchSampler(torch.utils.data.Sampler[BatchPlan]):
    """A rank's batches of one epoch after the other: ``batch_sampler`` of a torch DataLoader.

    Iterating gives what is left of the epoch; the next time, the next epoch. The state is the place
    behind the last batch that was given out, which a DataLoader fetches ahead of what is trained
    on: go by the ``cursor`` of a batch, or use a StatefulDataLoader. ``config`` are the options of
    ``kdstore.readers.batches.BatchConfig``.
    """

    def __init__(
        self,
        data: Samples | Mixture,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        **config: Any,
    ) -> None:
        self.rank, self.world_size = rank_and_world_size(rank, world_size)
        self._parts, self._config = parts_of(data), BatchConfig(**config)
        self._sequence = BatchSequence(self._parts, self._config, None)

    def __iter__(self) -> Iterator[BatchPlan]:
        self.load_state_dict(self.state_dict())  # what was planned ahead before is planned anew
        yield from self._sequence.steps(self.rank, self.world_size)

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last batch that was given out: JSON of less than 1 kB."""
        return self._sequence.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; of any number of ranks and workers.

        Raises UsageError for a state of other options, StoreMismatchError for one of other data.
        """
        self._sequence = BatchSequence(self._parts, self._config, state)


class EpochSampler(torch.utils.data.Sampler["Index"]):
    """A store's samples in a shuffled order that reads each row group once an epoch.

    ``sampler`` of a torch DataLoader; ``set_epoch`` names the epoch. Of a store with several draws
    it gives (index, draw), with the epoch's draw.
    """

    def __init__(self, store: Samples, *, seed: int) -> None:
        self.store, self.seed, self.epoch = store, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration; transformers and accelerate call this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.store)

    def __iter__(self) -> Iterator[Index]:
        config = BatchConfig(batch_size=1, seed=self.seed, streams=1)
        order = make_order(self.store, config, epoch=self.epoch)
        draw = self.epoch % self.store.num_draws
        for cell in range(order.num_cells(0)):
            for window in order.windows(0, cell):
                indices = window.indices.tolist()
                yield from indices if self.store.num_draws == 1 else ((i, draw) for i in indices)
