"""What a reader keeps open: shards, and the row groups that it read last."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from kdstore.commit import ShardRecord
from kdstore.filesystem import Folder
from kdstore.readers.decoder import RowDecoder
from kdstore.readers.rows import RowGroup
from kdstore.readers.shard import ShardReader

CACHED_ROW_GROUPS = 4
READ_AHEAD = 64  # samples that are read and decoded together


class ShardCache:
    """The opened shards of one folder. It is pickled empty: each process opens its own."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._shards: dict[str, ShardReader] = {}
        self._groups: OrderedDict[tuple[str, int], RowGroup] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _shards={}, _groups=OrderedDict())

    def shard(self, record: ShardRecord, decoder: RowDecoder) -> ShardReader:
        """The opened shard of a record."""
        if record.path not in self._shards:
            self._shards[record.path] = ShardReader(self.folder, record, decoder)
        return self._shards[record.path]

    def row_group(self, shard: ShardReader, group: int) -> RowGroup:
        """The rows of a row group of an opened shard."""
        key = (shard.record.path, group)
        if key not in self._groups:
            self._groups[key] = shard.row_group(group)
            while len(self._groups) > CACHED_ROW_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def close(self) -> None:
        """Close all shards; a later read opens them anew."""
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()
        self._groups.clear()
