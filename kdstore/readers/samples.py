"""What loaders and samplers read: numbered samples, which lie in shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdstore.align import TokenTable
from kdstore.filesystem import READS_AT_ONCE
from kdstore.readers.cache import READ_AHEAD
from kdstore.readers.outline import Outline
from kdstore.sample import Sample

if TYPE_CHECKING:
    from kdstore.readers.loader import Loader

Index = int | tuple[int, int]


class Samples(ABC):
    """The samples of a store, or of several: ``len``, ``samples[i]``, ``samples[i, draw]``.

    Shards are numbered in the order of their samples; all of a shard's samples follow each other.

    * ``shard_rows`` int64 [shards]: samples of each shard
    * ``shard_tokens`` int64 [shards]: tokens of each shard
    * ``first_rows`` int64 [shards + 1]: where each shard's samples begin, and how many there are
    * ``in_one_process``: whether no other process, such as a worker of a loader, can read them
    """

    in_one_process: bool = False

    shard_rows: NDArray[np.int64]
    shard_tokens: NDArray[np.int64]
    first_rows: NDArray[np.int64]

    @abstractmethod
    def __getitems__(self, indices: Sequence[Index]) -> list[Sample]:
        """Several samples in the order asked for; those of one row group are read together.

        Each is a sample of its own, also where an index comes twice.
        """

    @abstractmethod
    def outline(self, shard_index: int) -> Outline:
        """Row groups and lengths of the n-th shard; the last 256 outlines are kept.

        Raises CorruptShardError if they are not what was committed.
        """

    def outlines(self, shards: Sequence[int]) -> list[Outline]:
        """Row groups and lengths of several shards, read at once: that is mostly waiting."""
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            return list(pool.map(self.outline, shards))

    @abstractmethod
    def with_columns(self, columns: Sequence[str]) -> Samples:
        """The same samples, of which only some columns are read and decoded.

        ``entries`` are the distributions; the other names are plain columns and scalars. Ids, token
        ids and scored positions are always there. Raises UsageError for others.
        """

    @abstractmethod
    def prefetch(self, indices: Sequence[Index]) -> None:
        """Begin to read what some samples need, in the background; returns at once.

        What cannot be read is an error when the sample is asked for. It keeps to half of what
        ``reserve`` gives, and does nothing beyond it.
        """

    @abstractmethod
    def reserve(self, *, shards: int = 0, row_groups: int = 0) -> None:
        """Keep at least so many shards open and row groups in memory, of each overlay as well."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits that tell which samples these are, in which order."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V, the width of the teacher's logits."""

    @property
    @abstractmethod
    def vocab_digest(self) -> str:
        """Fingerprint of the teacher's token table."""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether every unit that was planned is committed."""

    @property
    @abstractmethod
    def num_draws(self) -> int:
        """Draws of the signal that can be read: 0 to this number - 1; 1 without overlays."""

    @abstractmethod
    def refresh(self) -> int:
        """Look for what was committed since; how many samples are new."""

    @abstractmethod
    def find(self, sample_id: str) -> int:
        """The index of a sample's id, by reading the id columns; KeyError if there is none."""

    @abstractmethod
    def token_table(self) -> TokenTable:
        """The bytes behind each token id."""

    @abstractmethod
    def close(self) -> None:
        """Close all shards; a later read opens them anew."""

    @property
    def num_shards(self) -> int:
        """How many shards hold the samples."""
        return len(self.shard_rows)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getitem__(self, index: Index) -> Sample:
        """The sample at an index, or at (index, draw); negative indices count from the end.

        Raises CorruptShardError on damage, and UsageError if there is no such draw.
        """
        return self.__getitems__([index])[0]

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), READ_AHEAD):
            yield from self.__getitems__(range(start, min(start + READ_AHEAD, len(self))))

    def row_groups(self) -> list[tuple[int, int]]:
        """Half-open ranges of indices that are read together; opens every shard."""
        sizes = [self.outline(shard).group_rows for shard in range(self.num_shards)]
        ends = np.cumsum(np.concatenate([np.zeros(0, np.int64), *sizes]))
        return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=False))

    def loader(self, **options: Any) -> Loader:
        """Batches for training; the options are those of ``kdstore.readers.loader.Loader``."""
        from kdstore.readers.loader import Loader

        return Loader(self, **options)

    def _places(self, indices: Sequence[Index]) -> tuple[list[int], list[int], list[int]]:
        """Shards, rows of all and draws of indices; IndexError if there is no such sample."""
        pairs = [index if isinstance(index, tuple) else (index, 0) for index in indices]
        numbers = np.array([number for number, _ in pairs], dtype=np.int64)
        rows = np.where(numbers < 0, numbers + len(self), numbers)
        wrong = (rows < 0) | (rows >= len(self))
        if wrong.any():
            raise IndexError(f"sample {numbers[wrong][0]} of {len(self)}")
        shards = np.searchsorted(self.first_rows, rows, side="right") - 1
        return shards.tolist(), rows.tolist(), [draw for _, draw in pairs]
