"""Batches of one epoch after the other, for all ranks: what comes next, and where that is.

Streams take turns, a batch each. A position is how far each has come, so that any number of ranks
can go on from it without reading what lies before.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from kdstore.errors import UsageError
from kdstore.readers.batches import BatchConfig
from kdstore.readers.order import Order
from kdstore.readers.packing import Former, Packs

if TYPE_CHECKING:
    from kdstore.readers.samples import Samples

BATCHES_PER_CELL = 256  # so few batches are not full, and so much is planned anew on resuming


def make_order(samples: Samples, config: BatchConfig, *, epoch: int) -> Order:
    """The order of an epoch.

    A cell has several hundred batches, so that its last one, which may not be full, matters little;
    and there are only as many streams as leave each a whole cell.
    """
    count, tokens = samples.num_shards, int(samples.shard_tokens.sum())
    per_sample = tokens / max(len(samples), 1)
    per_cell = BATCHES_PER_CELL * config.tokens_of_batch(per_sample)
    cell = max(config.shards_at_once, min(ceil(per_cell * count / max(tokens, 1)), count))
    streams = config.streams if config.shuffle else 1
    while streams > max(1, count // cell):
        streams //= 2
    return Order(
        samples,
        seed=config.seed,
        epoch=epoch,
        streams=streams,
        cell=cell,
        pool=config.shards_at_once,
        window=config.window,
        shuffle=config.shuffle,
    )


class EpochPlanner:
    """The batches of an epoch, in turn from its streams: ``next_batch`` until None.

    ``position`` is that of another planner of the same epoch, to go on from.
    """

    def __init__(self, order: Order, former: Former, *, position: str | None = None) -> None:
        self._order, self._former = order, former
        self._turn, at = _parse(position, order) if position else (0, [(0, 0)] * order.streams)
        self._streams = [_Stream(order, former, n, *place) for n, place in enumerate(at)]

    def next_batch(self) -> Packs | None:
        """The packs of the next batch; None once the epoch is over."""
        for _ in self._streams:
            stream = self._streams[self._turn]
            self._turn = (self._turn + 1) % len(self._streams)
            batch = stream.next_batch()
            if batch is not None:
                return batch
        return None

    @property
    def position(self) -> str:
        """How far each stream has come, as text."""
        numbers = [self._turn]
        for stream in self._streams:
            numbers += [stream.cell, stream.taken]
        data = np.array(numbers, dtype="<u4").view(np.uint8).reshape(-1, 4)
        # Bytes of a kind together: nearly all of the high ones are zero.
        return base64.b85encode(zlib.compress(data.T.tobytes(), 9)).decode("ascii")


class _Stream:
    """One stream's batches: ``cell`` is the one being read, ``taken`` its batches so far."""

    def __init__(self, order: Order, former: Former, number: int, cell: int, taken: int) -> None:
        self._order, self._former, self._number = order, former, number
        self.cell, self.taken = cell, taken
        self._batches: Iterator[Packs] | None = None

    def next_batch(self) -> Packs | None:
        while self.cell < self._order.num_cells(self._number):
            if self._batches is None:
                windows = self._order.windows(self._number, self.cell)
                self._batches = islice(self._former.batches(windows), self.taken, None)
            batch = next(self._batches, None)
            if batch is not None:
                self.taken += 1
                return batch
            self.cell, self.taken, self._batches = self.cell + 1, 0, None
        return None


def _parse(position: str, order: Order) -> tuple[int, list[tuple[int, int]]]:
    try:
        data = zlib.decompress(base64.b85decode(position))
        numbers = np.frombuffer(data, np.uint8).reshape(4, -1).T.copy().view("<u4").reshape(-1)
        turn, *rest = numbers.tolist()
        places = list(zip(rest[::2], rest[1::2], strict=True))
        if len(places) != order.streams or turn >= order.streams:
            raise ValueError(f"{len(places)} streams, and {turn} is next")
    except (ValueError, zlib.error) as error:
        raise UsageError(
            "the loader's state is damaged",
            where="position",
            expected="text that a loader gave for these data",
            got=error,
        ) from error
    return turn, places
