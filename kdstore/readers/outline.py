"""The outline of a shard: its row groups and how long its samples are, without the samples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.readers.shard import ShardReader

CACHED_OUTLINES = 256


@dataclass(frozen=True, eq=False)
class Outline:
    """What packing needs of a shard.

    * ``group_rows`` int64 [row groups]: rows of each row group
    * ``lengths`` int32 [rows]: tokens of each row
    """

    group_rows: NDArray[np.int64]
    lengths: NDArray[np.int32]


def read_outline(shard: ShardReader) -> Outline:
    """A shard's outline, from its footer and its column ``num_tokens``.

    Raises CorruptShardError if the lengths cannot be read, or do not sum to what was committed.
    """
    return Outline(np.diff(shard.first_rows).astype(np.int64), shard.lengths())


class OutlineCache:
    """The outlines that were read last, by path of the shard. It is pickled empty."""

    def __init__(self) -> None:
        self._outlines: OrderedDict[str, Outline] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._outlines = OrderedDict()

    def get(self, path: str, open_shard: Callable[[], ShardReader]) -> Outline:
        """The outline of the shard at a path, which is opened where it was not read yet."""
        outline = self._outlines.pop(path, None) or read_outline(open_shard())
        self._outlines[path] = outline
        while len(self._outlines) > CACHED_OUTLINES:
            self._outlines.popitem(last=False)
        return outline
