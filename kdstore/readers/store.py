"""``kdstore.open``: a store as a random-access sequence of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy as shallow_copy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdstore.align import TokenTable
from kdstore.align.tokenizer_files import TABLE_FILE
from kdstore.codecs import IdOrder, SignalCodec, codec_named
from kdstore.commit import load_commits, read_part
from kdstore.errors import HeaderError, UsageError
from kdstore.filesystem import Folder
from kdstore.header import Header, read_header
from kdstore.layout import HEADER, ID_ORDER, MAIN_SIGNAL, TOKENIZER
from kdstore.readers.background import Background
from kdstore.readers.cache import READ_AHEAD, ShardCache
from kdstore.readers.decoder import RowDecoder
from kdstore.readers.download import ShardFiles, shard_files
from kdstore.readers.overlay import Overlays
from kdstore.readers.shard import ShardReader
from kdstore.sample import Sample

if TYPE_CHECKING:
    from kdstore.readers.loader import Loader

Index = int | tuple[int, int]


def open(
    url: str | Path,
    *,
    signal: str = MAIN_SIGNAL,
    overlays: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    cache_bytes: int | None = None,
    **storage_options: Any,
) -> Store:
    """The store at a path or fsspec URL, of which one named signal is read.

    ``overlays`` names those to read with it; None reads every one that is complete. Shards of a
    remote store are kept whole in ``cache_dir``, of ``cache_bytes`` in all; without one (nor
    ``KDSTORE_CACHE_DIR``) they are read by ranges. Raises StoreNotFoundError if there is no store,
    HeaderError if its header or that of an overlay cannot be read, and UsageError if a named
    overlay is missing or incomplete, or the cache has no size.
    """
    files = shard_files(cache_dir, cache_bytes)
    return Store(Folder(url, **storage_options), signal=signal, overlays=overlays, files=files)


class Store:
    """The committed samples of a store, in order of unit: ``len``, ``store[i]``, iteration.

    ``store[i, r]`` is the sample with draw r of its signal, ``store[i]`` that with draw 0. The
    scalars of overlays come with either.

    Opens no shard before one is needed. Can be pickled: files are opened anew in each process, so a
    torch DataLoader may fork or spawn.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        signal: str = MAIN_SIGNAL,
        overlays: Sequence[str] | None = None,
        files: ShardFiles | None = None,
    ) -> None:
        self.folder, self.signal = folder, signal
        self._cache, self._background = ShardCache(folder, files=files), Background()
        self._decoder: RowDecoder | None = None
        self.header = read_header(folder)
        _check_signal(self.header, signal, folder)
        self.commits = list(load_commits(folder, self.header).values())
        self.first_rows = np.cumsum([0, *(commit.shard.rows for commit in self.commits)])
        units = [commit.unit for commit in self.commits]
        self.overlays = Overlays(
            folder, self.header, signal=signal, units=units, names=overlays, files=files
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_decoder": None}

    def __repr__(self) -> str:
        return f"Store({self.folder.url!r}, {len(self)} samples)"

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getitem__(self, index: Index) -> Sample:
        """The sample at an index, or at (index, draw); negative indices count from the end.

        Raises CorruptShardError on damage, and UsageError if the store has no such draw.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Index]) -> list[Sample]:
        """Several samples in the order asked for; those of one row group are read together.

        Each is a sample of its own, also where an index comes twice.
        """
        wanted = [self._normal(index) for index in indices]
        by_group: dict[tuple[int, int, int], list[int]] = {}
        for n, (row, draw) in enumerate(wanted):
            by_group.setdefault((*self._group_of(row), draw), []).append(n)
        found: dict[int, Sample] = {}
        for (unit_index, group, draw), members in sorted(by_group.items()):
            first = int(self.first_rows[unit_index])
            rows = [wanted[n][0] - first for n in members]
            found.update(zip(members, self._read(unit_index, group, rows, draw), strict=True))
        return [found[n] for n in range(len(wanted))]

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), READ_AHEAD):
            yield from self.__getitems__(range(start, min(start + READ_AHEAD, len(self))))

    def _normal(self, index: Index) -> tuple[int, int]:
        number, draw = index if isinstance(index, tuple) else (index, 0)
        row = number + len(self) if number < 0 else number
        if not 0 <= row < len(self):
            raise IndexError(f"sample {number} of a store of {len(self)}")
        return int(row), draw

    def _group_of(self, row: int) -> tuple[int, int]:
        """The unit's place in the store, and the row group in its shard."""
        unit_index = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        group, _ = self.shard(unit_index).group_of_row(row - int(self.first_rows[unit_index]))
        return unit_index, group

    def _read(self, unit_index: int, group: int, rows: list[int], draw: int) -> list[Sample]:
        """Samples of one row group, by their rows in the shard."""
        first = int(self.shard(unit_index).first_rows[group])
        places = [row - first for row in rows]
        samples = self._cache.read(
            self.commits[unit_index].shard,
            self.decoder,
            group,
            partial(ShardReader.samples, group=group, places=places),
        )
        unit, codec = self.commits[unit_index].unit, self.decoder.codec
        return self.overlays.extend(samples, unit=unit, rows=rows, draw=draw, codec=codec)

    def prefetch(self, indices: Sequence[Index]) -> None:
        """Begin to read what some samples need, in the background; returns at once.

        What cannot be read is an error when the sample is asked for. It keeps to half of what
        ``reserve`` gives, and does nothing beyond it.
        """
        by_unit: dict[tuple[int, int], list[int]] = {}
        for row, draw in map(self._normal, indices):
            unit_index = int(np.searchsorted(self.first_rows, row, side="right")) - 1
            in_shard = row - int(self.first_rows[unit_index])
            by_unit.setdefault((unit_index, draw), []).append(in_shard)
        for (unit_index, draw), rows in by_unit.items():
            self._background.submit(partial(self._prefetch, unit_index, rows, draw))

    def _prefetch(self, unit_index: int, rows: list[int], draw: int) -> None:
        commit, background = self.commits[unit_index], self._background
        self._cache.prefetch(background, commit.shard, self.decoder, rows)
        self.overlays.prefetch(
            background, unit=commit.unit, rows=rows, draw=draw, codec=self.decoder.codec
        )

    def reserve(self, *, shards: int = 0, row_groups: int = 0) -> None:
        """Keep at least so many shards open and row groups in memory, of each overlay as well."""
        self._cache.reserve(shards=shards, row_groups=row_groups)
        self.overlays.reserve(shards=shards, row_groups=row_groups)

    def with_signal(self, signal: str) -> Store:
        """The same samples with another of the store's signals, at the positions it covers.

        Raises UsageError if the store has none of that name.
        """
        if signal == self.signal:
            return self
        _check_signal(self.header, signal, self.folder)
        other = shallow_copy(self)
        files = self._cache.files
        other.signal, other._cache = signal, ShardCache(self.folder, files=files)
        units = [commit.unit for commit in self.commits]
        other.overlays = Overlays(self.folder, self.header, signal=signal, units=units, files=files)
        return other

    @property
    def config_digest(self) -> str:
        """Digest of what the store is; equal for every part and resume of one dump."""
        return self.header.config_digest

    @property
    def vocab_size(self) -> int:
        """V, the width of the teacher's logits."""
        return int(self.header.identity["vocab_size"])

    @property
    def is_complete(self) -> bool:
        """Whether every unit of the plan is committed."""
        return len(self.commits) == self.header.num_units

    @property
    def num_draws(self) -> int:
        """Draws of the signal that can be read: 0 to this number - 1; 1 without overlays."""
        return self.overlays.num_draws

    def row_groups(self) -> list[tuple[int, int]]:
        """Half-open ranges of indices that are read together; opens every shard."""
        ranges = []
        for unit_index, first in enumerate(self.first_rows[:-1].tolist()):
            bounds = (first + self.shard(unit_index).first_rows).tolist()
            ranges += list(pairwise(bounds))
        return ranges

    def loader(self, **options: Any) -> Loader:
        """Batches for training; the options are those of ``kdstore.readers.loader.Loader``."""
        from kdstore.readers.loader import Loader

        return Loader(self, **options)

    def close(self) -> None:
        """Close all shards; a later read opens them anew."""
        self._background.stop()
        self._cache.close()
        self.overlays.close()

    def find(self, sample_id: str) -> int:
        """The index of a sample's id, by reading the id column; KeyError if there is none."""
        for unit_index in range(len(self.commits)):
            ids = self.shard(unit_index).column("sample_id")
            if sample_id in ids:
                return int(self.first_rows[unit_index]) + ids.index(sample_id)
        raise KeyError(sample_id)

    def token_table(self) -> TokenTable:
        """The bytes behind each token id."""
        name = f"{TOKENIZER}/{TABLE_FILE}"
        return TokenTable.from_bytes(read_part(self.folder, name), where=self.folder.location(name))

    def copy_tokenizer(self, target: str | Path) -> None:
        """Copy the stored tokenizer files into a local folder, as transformers lays them out."""
        for path in self.header.files:
            name = path.removeprefix(f"{TOKENIZER}/")
            if name not in (path, TABLE_FILE):
                copy = Path(target) / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(read_part(self.folder, path))

    def shard(self, unit_index: int) -> ShardReader:
        """The opened shard of the n-th committed unit."""
        return self._cache.shard(self.commits[unit_index].shard, self.decoder)

    @property
    def decoder(self) -> RowDecoder:
        """What turns rows into samples; reads the id order on first use."""
        if self._decoder is None:
            self._decoder = RowDecoder(self.header, self._codec(), self.signal)
        return self._decoder

    def _codec(self) -> SignalCodec:
        order = IdOrder.from_bytes(
            read_part(self.folder, ID_ORDER),
            expected_digest=self.header.identity["id_order_digest"],
            where=self.folder.location(ID_ORDER),
        )
        if order.vocab_size != self.vocab_size:
            raise HeaderError(
                "the id order is not of the store's vocabulary",
                where=self.folder.location(ID_ORDER),
                expected=f"{self.vocab_size} ids",
                got=order.vocab_size,
            )
        signal = self.header.identity["signals"][self.signal]
        return codec_named(
            signal["codec"],
            signal["selection"],
            order=order,
            scalars=signal["scalars"],
            where=self.folder.location(HEADER),
        )


def _check_signal(header: Header, signal: str, folder: Folder) -> None:
    if signal not in header.identity["signals"]:
        raise UsageError(
            f"the store has no signal {signal!r}",
            where=folder.url,
            expected="one of " + ", ".join(header.identity["signals"]),
            got=signal,
        )
