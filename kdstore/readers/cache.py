"""What a reader keeps open: shards, and the row groups that it read last."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, TypeVar

from kdstore.commit import ShardRecord
from kdstore.errors import CorruptShardError
from kdstore.filesystem import Folder
from kdstore.readers.background import Background
from kdstore.readers.decoder import RowDecoder
from kdstore.readers.download import ShardFiles
from kdstore.readers.rows import RowGroup
from kdstore.readers.shard import ShardReader

CACHED_ROW_GROUPS = 4
OPEN_SHARDS = 64
READ_AHEAD = 64  # samples that are read and decoded together
A = TypeVar("A")


class ShardCache:
    """The shards of one folder that were used last, and row groups of them.

    It is pickled empty, and empty in a forked child: each process opens its own. A shard that
    leaves it is closed when nobody reads it any more.
    """

    def __init__(self, folder: Folder, *, files: ShardFiles | None = None) -> None:
        self.folder, self.files = folder, files
        self._shards: LastUsed[ShardReader] = LastUsed(OPEN_SHARDS)
        self._groups: LastUsed[RowGroup] = LastUsed(CACHED_ROW_GROUPS)

    def reserve(self, *, shards: int = 0, row_groups: int = 0) -> None:
        """Keep at least so many from now on."""
        self._shards.reserve(shards)
        self._groups.reserve(row_groups)

    def shard(self, record: ShardRecord, decoder: RowDecoder) -> ShardReader:
        """The opened shard of a record."""
        return self._shards.get(record.path, self._opening(record, decoder))

    def row_group(self, shard: ShardReader, group: int) -> RowGroup:
        """The rows of a row group of an opened shard."""
        return self._groups.get((shard.record.path, group), lambda: shard.row_group(group))

    def read(
        self,
        record: ShardRecord,
        decoder: RowDecoder,
        group: int,
        use: Callable[[ShardReader, RowGroup], A],
    ) -> A:
        """What ``use`` makes of a row group; a local copy it finds damaged is fetched again."""
        shard = self.shard(record, decoder)
        try:
            return use(shard, self.row_group(shard, group))
        except CorruptShardError:
            if not shard.is_copy:
                raise
        shard.renew()
        for other in range(shard.num_row_groups):
            self._groups.drop((record.path, other))
        return use(shard, self.row_group(shard, group))

    def prefetch(
        self,
        background: Background,
        record: ShardRecord,
        decoder: RowDecoder,
        rows: Sequence[int],
    ) -> None:
        """Open a shard now, and have the row groups of some rows read in the background."""
        future = self._shards.prefetch(record.path, self._opening(record, decoder))
        if future is None:
            return
        shard = future.result()
        for group in by_group(shard, rows):
            read = partial(shard.row_group, group)
            background.submit(partial(self._groups.prefetch, (record.path, group), read))

    def close(self) -> None:
        """Close all shards; a later read opens them anew."""
        self._shards.clear()
        self._groups.clear()

    def _opening(self, record: ShardRecord, decoder: RowDecoder) -> Callable[[], ShardReader]:
        return lambda: ShardReader(self.folder, record, decoder, files=self.files)


class LastUsed(Generic[A]):
    """The ``most`` values that were used last, each made once however many threads ask for it.

    Pickled empty, and empty in a forked child, whose parent's threads would never finish there.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._begin()

    def _begin(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._values: OrderedDict[Hashable, Future[A]] = OrderedDict()
        self._unread: set[Hashable] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return LastUsed, (self._most,)

    def reserve(self, most: int) -> None:
        """Keep at least so many."""
        self._most = max(self._most, most)

    def get(self, key: Hashable, make: Callable[[], A]) -> A:
        """The value of a key, made if need be; what went wrong is raised, and then forgotten."""
        future = self._future(key, make)
        try:
            return future.result()
        except BaseException:
            self.drop(key, future)
            raise

    def prefetch(self, key: Hashable, make: Callable[[], A]) -> Future[A] | None:
        """Make a value for a later ``get``, which raises what goes wrong.

        None, and nothing is made, where half of the room holds such already.
        """
        self._in_this_process()
        with self._lock:
            room = key in self._values or len(self._unread) < max(1, self._most // 2)
        return self._future(key, make, unread=True) if room else None

    def drop(self, key: Hashable, future: Future[A] | None = None) -> None:
        """Forget a key, or only if it has this future."""
        with self._lock:
            if future is None or self._values.get(key) is future:
                self._values.pop(key, None)
                self._unread.discard(key)

    def clear(self) -> None:
        """Forget all."""
        self._in_this_process()
        with self._lock:
            self._values.clear()
            self._unread.clear()

    def _future(self, key: Hashable, make: Callable[[], A], *, unread: bool = False) -> Future[A]:
        self._in_this_process()
        with self._lock:
            future = self._values.get(key)
            known = future is not None
            if future is None:
                future = self._values[key] = Future()
                if unread:
                    self._unread.add(key)
            if not unread:
                self._unread.discard(key)
            self._values.move_to_end(key)
            while len(self._values) > self._most:
                self._unread.discard(self._values.popitem(last=False)[0])
        if not known:
            try:
                future.set_result(make())
            except BaseException as error:  # whoever asks for the value raises it
                future.set_exception(error)
        return future

    def _in_this_process(self) -> None:
        if self._process != os.getpid():
            self._begin()


def by_group(shard: ShardReader, rows: Sequence[int]) -> dict[int, list[int]]:
    """The places in ``rows`` by the row group that holds the row."""
    groups: dict[int, list[int]] = {}
    for n, group in enumerate(shard.groups_of_rows(rows)):
        groups.setdefault(group, []).append(n)
    return groups
