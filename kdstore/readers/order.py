"""The order of an epoch: a pure function of the data, the seed and the epoch.

Shards are shuffled and dealt to ``streams``; a stream reads its shards a few at a time, and
shuffles their row groups, and the samples of every few row groups. So a sample costs the reading of
its row group once, only a few are in memory, and who reads some streams needs only their shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdstore.hashing import Purpose, hash_fields

if TYPE_CHECKING:
    from kdstore.readers.outline import Outline
    from kdstore.readers.samples import Samples

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Samples that are shuffled together: their numbers, and ``lengths`` in tokens."""

    indices: Ints
    lengths: Ints

    def __getitem__(self, picked: NDArray[np.bool_] | Ints) -> Window:
        return Window(self.indices[picked], self.lengths[picked])


@dataclass(frozen=True)
class Order:
    """Which samples follow which.

    * ``streams``: shares of the shards, read in turn
    * ``cell``: shards of a stream after which it begins anew; a position is a cell, and how much of
      it is done
    * ``pool``: shards of a cell whose row groups are shuffled together
    * ``window``: row groups whose samples are shuffled together
    * ``shuffle``: else the samples come as they lie, in one stream
    """

    samples: Samples
    seed: int
    epoch: int
    streams: int
    cell: int
    pool: int
    window: int
    shuffle: bool = True

    def num_cells(self, stream: int) -> int:
        """Cells of a stream."""
        return -(-len(self._shards_of(stream)) // self.cell)

    def windows(self, stream: int, cell: int) -> Iterator[Window]:
        """The windows of a cell; what they are is read when one is asked for."""
        shards = self._shards_of(stream)[cell * self.cell : (cell + 1) * self.cell]
        for start in range(0, len(shards), self.pool):
            yield from self._windows_of_pool(shards[start : start + self.pool])

    @cached_property
    def _shards(self) -> Ints:
        shards = np.arange(self.samples.num_shards)
        return self._shuffled(shards, shards, Purpose.SHARD_ORDER)

    def _shards_of(self, stream: int) -> Ints:
        return self._shards[stream :: self.streams]

    def _windows_of_pool(self, shards: Ints) -> Iterator[Window]:
        outlines = self.samples.outlines(shards.tolist())
        pairs = zip(shards.tolist(), outlines, strict=True)
        blocks = [block for shard, outline in pairs for block in self._row_groups(shard, outline)]
        firsts = np.array([int(block.indices[0]) for block in blocks])
        numbers = self._shuffled(np.arange(len(blocks)), firsts, Purpose.GROUP_ORDER).tolist()
        for start in range(0, len(numbers), self.window):
            picked = [blocks[number] for number in numbers[start : start + self.window]]
            indices = np.concatenate([block.indices for block in picked])
            lengths = np.concatenate([block.lengths for block in picked])
            places = self._shuffled(np.arange(len(indices)), indices, Purpose.ORDER)
            yield Window(indices, lengths)[places]

    def _row_groups(self, shard: int, outline: Outline) -> Iterator[Window]:
        ends = np.cumsum(outline.group_rows).tolist()
        first = int(self.samples.first_rows[shard])
        for start, end in pairwise([0, *ends]):
            if start < end:
                indices = np.arange(first + start, first + end)
                yield Window(indices, outline.lengths[start:end].astype(np.int64))

    def _shuffled(self, values: Ints, names: Ints, purpose: Purpose) -> Ints:
        """Values in the order of the hashes of their names."""
        if not self.shuffle:
            return values
        keys = hash_fields(self.seed, self.epoch, int(purpose), names)
        return values[np.argsort(keys, kind="stable")]
