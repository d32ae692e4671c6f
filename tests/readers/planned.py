"""Samples that exist by their lengths only, for tests of order, packing and resuming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.readers.batches import BatchPlan
from kdstore.readers.outline import Outline
from kdstore.readers.sampler import BatchSampler


class FakeSamples:
    """Shards of random row groups and lengths; what a planner asks of a store, and no more."""

    num_draws = 1
    vocab_digest = "v"

    def __init__(
        self, num_shards: int, *, seed: int = 0, rows: int = 60, longest: int = 900, name: str = "f"
    ) -> None:
        generator = np.random.default_rng(seed)
        self._outlines = []
        for _ in range(num_shards):
            groups = generator.integers(1, rows // 4, generator.integers(1, 8))
            lengths = np.exp(generator.uniform(1.5, np.log(longest), groups.sum())).astype(np.int32)
            self._outlines.append(Outline(groups, lengths))
        self.shard_rows = np.array([len(o.lengths) for o in self._outlines], dtype=np.int64)
        self.shard_tokens = np.array([o.lengths.sum() for o in self._outlines], dtype=np.int64)
        self.first_rows = np.append(np.int64(0), np.cumsum(self.shard_rows))
        self.fingerprint = f"{name}-{seed}-{num_shards}"
        self.opened: set[int] = set()

    @property
    def num_shards(self) -> int:
        return len(self._outlines)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    @property
    def lengths(self) -> NDArray[np.int32]:
        return np.concatenate([o.lengths for o in self._outlines])

    def outlines(self, shards: Sequence[int]) -> list[Outline]:
        self.opened |= set(shards)
        return [self._outlines[shard] for shard in shards]


def content(plan: BatchPlan) -> list[tuple[int, ...]]:
    """The pieces of a plan."""
    return [tuple(piece) for piece in plan.pieces.tolist()]


def epoch_of(data: Any, *, world_size: int = 1, **options: Any) -> list[list[BatchPlan]]:
    """An epoch's steps: the plans of all ranks."""
    ranks: list[Iterator[BatchPlan]] = [
        iter(BatchSampler(data, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]
    return [list(step) for step in zip(*ranks, strict=True)]
