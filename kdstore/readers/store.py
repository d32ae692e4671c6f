"""A store as a random-access sequence of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy as shallow_copy
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kdstore.align import TokenTable
from kdstore.align.tokenizer_files import TABLE_FILE
from kdstore.codecs import IdOrder, SignalCodec, codec_named
from kdstore.commit import read_part
from kdstore.commits import load_commits
from kdstore.errors import HeaderError, StoreMismatchError, UsageError
from kdstore.filesystem import Folder
from kdstore.hashing import sha256_hex
from kdstore.header import Header, first_difference, read_header
from kdstore.layout import HEADER, ID_ORDER, MAIN_SIGNAL, TOKENIZER
from kdstore.readers.background import Background
from kdstore.readers.cache import ShardCache, by_group
from kdstore.readers.columns import Columns
from kdstore.readers.decoder import RowDecoder
from kdstore.readers.download import ShardFiles
from kdstore.readers.outline import Outline, OutlineCache
from kdstore.readers.overlay import Overlays
from kdstore.readers.samples import Index, Samples
from kdstore.readers.shard import DECODE_ERRORS, ShardReader
from kdstore.sample import Sample

A = TypeVar("A")
# (unit's place in the store, row group, draw): place in what was asked for -> row in the shard.
_ByGroup = dict[tuple[int, int, int], dict[int, int]]


class Store(Samples):
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
        self.folder, self.signal, self._named_overlays = folder, signal, overlays
        self._cache, self._background = ShardCache(folder, files=files), Background()
        self._outlines = OutlineCache()
        self._decoder: RowDecoder | None = None
        self._columns: Columns | None = None
        self.header = read_header(folder)
        _check_signal(self.header, signal, folder)
        self.commits = load_commits(folder, self.header)
        self.shard_rows = self.commits.numbers("rows")
        self.shard_tokens = self.commits.numbers("tokens")
        self.first_rows = np.append(np.int64(0), np.cumsum(self.shard_rows))
        self.overlays = self._find_overlays()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_decoder": None}

    def __repr__(self) -> str:
        return f"Store({self.folder.url!r}, {len(self)} samples)"

    def __getitems__(self, indices: Sequence[Index]) -> list[Sample]:
        """Several samples in the order asked for; those of one row group are read together.

        Each is a sample of its own, also where an index comes twice.
        """
        if not len(indices):
            return []
        groups = self._by_group(indices)
        samples = self._decoded(groups, len(indices))
        for (unit_index, _, draw), members in groups.items():
            some = self.overlays.extend(
                [samples[n] for n in members],
                unit=int(self.commits.units[unit_index]),
                rows=list(members.values()),
                draw=draw,
                codec=self.decoder.codec,
            )
            for n, sample in zip(members, some, strict=True):
                samples[n] = sample
        return samples if self._columns is None else list(map(self._columns.reduce, samples))

    def _by_unit(self, indices: Sequence[Index]) -> dict[tuple[int, int], dict[int, int]]:
        """By unit's place in the store, and draw: place in ``indices`` -> row in the shard."""
        by_unit: dict[tuple[int, int], dict[int, int]] = {}
        for n, (unit_index, row, draw) in enumerate(zip(*self._places(indices), strict=True)):
            by_unit.setdefault((unit_index, draw), {})[n] = row - int(self.first_rows[unit_index])
        return by_unit

    def _by_group(self, indices: Sequence[Index]) -> _ByGroup:
        """The same by unit, row group and draw."""
        groups: _ByGroup = {}
        for (unit_index, draw), members in self._by_unit(indices).items():
            numbers, rows = list(members), list(members.values())
            for group, places in by_group(self.shard(unit_index), rows).items():
                some = {numbers[place]: rows[place] for place in places}
                groups[unit_index, group, draw] = some
        return groups

    def _decoded(self, groups: _ByGroup, count: int) -> list[Sample]:
        """The samples of all groups, in the order asked for, decoded together.

        One by one if that fails, so that the error names its row.
        """
        cells: dict[str, dict[int, Any]] = {}
        for (unit_index, group, _), members in groups.items():
            taken = self._read(unit_index, group, members, ShardReader.cells)
            for name, column in taken.items():
                cells.setdefault(name, {}).update(zip(members, column, strict=True))
        try:
            rows = {name: [column[n] for n in range(count)] for name, column in cells.items()}
            return self.decoder.samples(rows)
        except DECODE_ERRORS:
            found: dict[int, Sample] = {}
            for (unit_index, group, _), members in groups.items():
                some = self._read(unit_index, group, members, ShardReader.samples)
                found.update(zip(members, some, strict=True))
            return [found[n] for n in range(count)]

    def _read(
        self, unit_index: int, group: int, members: dict[int, int], use: Callable[..., A]
    ) -> A:
        """What a method of a shard's reader makes of rows of one row group."""
        first = int(self.shard(unit_index).first_rows[group])
        places = [row - first for row in members.values()]
        record = self.commits.record(unit_index)
        read = partial(use, group=group, places=places)
        return self._cache.read(record, self.decoder, group, read)

    def prefetch(self, indices: Sequence[Index]) -> None:
        """Begin to read what some samples need, in the background; returns at once.

        What cannot be read is an error when the sample is asked for. It keeps to half of what
        ``reserve`` gives, and does nothing beyond it.
        """
        for (unit_index, draw), members in self._by_unit(indices).items():
            rows = list(members.values())
            self._background.submit(partial(self._prefetch, unit_index, rows, draw))

    def _prefetch(self, unit_index: int, rows: list[int], draw: int) -> None:
        unit, codec = int(self.commits.units[unit_index]), self.decoder.codec
        record = self.commits.record(unit_index)
        self._cache.prefetch(self._background, record, self.decoder, rows)
        self.overlays.prefetch(self._background, unit=unit, rows=rows, draw=draw, codec=codec)

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
        other.signal, other._named_overlays = signal, None
        other._cache = ShardCache(self.folder, files=self._cache.files)
        other.overlays = other._find_overlays()
        return other

    def with_columns(self, columns: Sequence[str]) -> Store:
        """The same samples, of which only some columns are read and decoded.

        ``entries`` are the distributions; the other names are plain columns and scalars, those of
        overlays included. Ids, token ids and scored positions are always there. Row hashes cover
        all columns and are not checked then; page checksums are. Raises UsageError for others.
        """
        other = shallow_copy(self)
        other._columns, other._decoder = Columns(frozenset(columns)), None
        other._cache = ShardCache(self.folder, files=self._cache.files)
        other.overlays = self.overlays.reduced(other._columns)
        plain = self.header.identity["columns"]
        other._columns.expect({*plain, *self.scalars}, where=self.folder.url)
        return other

    def reopened(self) -> Store:
        """The same samples with readers of its own, for use in another thread beside this one."""
        other = shallow_copy(self)
        other._cache = ShardCache(self.folder, files=self._cache.files)
        other.overlays = shallow_copy(self.overlays)
        other._decoder = self.decoder
        return other

    def _find_overlays(self) -> Overlays:
        return Overlays(
            self.folder,
            self.header,
            signal=self.signal,
            units=self.commits.units,
            names=self._named_overlays,
            files=self._cache.files,
        )

    @property
    def config_digest(self) -> str:
        """Digest of what the store is; equal for every part and resume of one dump."""
        return self.header.config_digest

    @property
    def selection(self) -> str:
        """The rule that picked the entries, such as ``pps:tau=0.06``."""
        return str(self.header.identity["signals"][self.signal]["selection"])

    @property
    def scalars(self) -> set[str]:
        """Names of the scalars of every position, those of overlays included."""
        return {*self.header.identity["signals"][self.signal]["scalars"], *self.overlays.scalars}

    @property
    def vocab_size(self) -> int:
        """V, the width of the teacher's logits."""
        return int(self.header.identity["vocab_size"])

    @property
    def vocab_digest(self) -> str:
        """Fingerprint of the teacher's token table."""
        return str(self.header.identity["vocab_digest"])

    @property
    def is_complete(self) -> bool:
        """Whether every unit of the plan is committed."""
        return len(self.commits) == self.header.num_units

    @property
    def num_draws(self) -> int:
        """Draws of the signal that can be read: 0 to this number - 1; 1 without overlays."""
        return self.overlays.num_draws

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell which samples these are, in which order.

        A digest of ``config_digest`` and of the committed shards' hashes, in order of unit; what
        overlays add is no part of it.
        """
        hashes = self.commits.texts("xxh3_128")
        return sha256_hex("\n".join([self.config_digest, *hashes]).encode())[:16]

    def shard_urls(self) -> list[str]:
        """Full paths or URLs of the committed shards, in order of their samples.

        Any Parquet reader opens them; none of them checks what ``kdstore`` does.
        """
        root, paths = self.folder.local_root, self.commits.texts("path")
        return [str(root / path) if root else self.folder.location(path) for path in paths]

    def outline(self, shard_index: int) -> Outline:
        """Row groups and lengths of the n-th committed unit's shard; the last 256 are kept.

        Raises CorruptShardError if they are not what was committed.
        """
        path = self.commits.record(shard_index).path
        return self._outlines.get(path, lambda: self.shard(shard_index))

    def refresh(self) -> int:
        """Look for units that were committed since; how many samples are new.

        The store is then as one opened now. Samples stay in order of unit: those of a unit that was
        committed late come before those of later units, which move up. So keep sample ids across a
        refresh, not indices; ``fingerprint`` tells whether anything is new. Without a refresh,
        nothing of this changes. Copies in other processes stay as they are.

        Raises StoreMismatchError, and changes nothing, if there is another store now, and what
        ``kdstore.open`` raises.
        """
        self._check_same(read_header(self.folder))
        now = Store(
            self.folder,
            signal=self.signal,
            overlays=self._named_overlays,
            files=self._cache.files,
        )
        is_new = ~np.isin(now.commits.units, self.commits.units)
        names = ("_cache", "_background", "_decoder", "_outlines", "_columns")
        kept = {name: vars(self)[name] for name in names}
        if self._columns is not None:
            now.overlays = now.overlays.reduced(self._columns)
        self.overlays.close()
        vars(self).update(vars(now) | kept)
        return int(self.shard_rows[is_new].sum())

    def _check_same(self, header: Header) -> None:
        """StoreMismatchError unless a header that was read later is that of this store."""
        difference = first_difference(self.header.identity, header.identity)
        if difference is not None:
            name, old, new = difference
            raise StoreMismatchError(
                f"there is another store now: {name} differs",
                where=self.folder.location(HEADER),
                expected=f"{name} = {old!r}, as when it was opened",
                got=f"{name} = {new!r}",
                todo="open the store anew, and take no index or loader state across",
            )

    def close(self) -> None:
        """Close all shards; a later read opens them anew."""
        self._background.stop()
        self._cache.close()
        self.overlays.close()

    def find(self, sample_id: str) -> int:
        """The index of a sample's id, by reading the id column; KeyError if there is none."""
        for index, found in enumerate(self.sample_ids()):
            if found == sample_id:
                return index
        raise KeyError(sample_id)

    def sample_ids(self) -> Iterator[str]:
        """The id of each sample, in order, by reading the id columns."""
        for unit_index in range(len(self.commits)):
            yield from self.shard(unit_index).column("sample_id")

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
        return self._cache.shard(self.commits.record(unit_index), self.decoder)

    @property
    def decoder(self) -> RowDecoder:
        """What turns rows into samples; reads the id order on first use."""
        if self._decoder is None:
            self._decoder = RowDecoder(self.header, self._codec(), self.signal, self._columns)
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
        signal, where = self.header.identity["signals"][self.signal], self.folder.location(HEADER)
        if self._columns is not None:
            return self._columns.codec(signal, order=order, where=where)
        return codec_named(
            signal["codec"],
            signal["selection"],
            order=order,
            scalars=signal["scalars"],
            where=where,
        )


def _check_signal(header: Header, signal: str, folder: Folder) -> None:
    if signal not in header.identity["signals"]:
        raise UsageError(
            f"the store has no signal {signal!r}",
            where=folder.url,
            expected="one of " + ", ".join(header.identity["signals"]),
            got=signal,
        )
