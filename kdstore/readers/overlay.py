"""Overlays as a reader sees them: what they add to the samples of their store.

An overlay is read once every unit of the store has it. Where two hold the same draw, or the same
scalar, the first by name is read, and the store's own scalars come before any.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy as shallow_copy
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs import SignalCodec, codec_named
from kdstore.codecs.scalars_only import ScalarsCodec
from kdstore.commit import ShardRecord
from kdstore.errors import UsageError
from kdstore.filesystem import Folder
from kdstore.header import Header
from kdstore.layout import OVERLAY_HEADER, is_overlay_name
from kdstore.overlay import Overlay, read_overlay, read_overlays
from kdstore.readers.background import Background
from kdstore.readers.cache import ShardCache, by_group
from kdstore.readers.columns import ENTRIES, Columns
from kdstore.readers.decoder import RowDecoder
from kdstore.readers.download import ShardFiles
from kdstore.readers.shard import ShardReader
from kdstore.sample import Sample
from kdstore.signal import SparseSignal


class Overlays:
    """The overlays of an opened store: ``found`` by name, of which the complete ones are read.

    With ``names`` only these are looked at; UsageError if one is missing or incomplete.
    """

    def __init__(
        self,
        folder: Folder,
        header: Header,
        *,
        signal: str,
        units: NDArray[np.int64],
        names: Sequence[str] | None = None,
        files: ShardFiles | None = None,
    ) -> None:
        self._files, self._reserved = files, dict[str, int]()
        if names is None:
            overlays = read_overlays(folder, header)
        else:
            overlays = [_named(folder, name, header, units) for name in sorted(set(names))]
        self.found = {o.name: o for o in overlays if o.header.identity["signal"] == signal}
        complete = [overlay for overlay in self.found.values() if overlay.commits.covers(units)]
        draws = {overlay.header.draw: overlay.name for overlay in reversed(complete)}
        self._draws = {draw: name for draw, name in draws.items() if draw}
        self._scalars = [overlay.name for overlay in complete if not overlay.header.draw]
        self._readers: dict[str, OverlayReader] = {}
        self._entries = True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_readers": {}}

    @property
    def num_draws(self) -> int:
        """How many draws there are without a gap, the store's own included."""
        return next(draw for draw in count(1) if draw not in self._draws)

    @property
    def scalars(self) -> set[str]:
        """Names of the scalars that are added to every sample."""
        return {scalar for name in self._scalars for scalar in self.found[name].header.scalars}

    def reduced(self, columns: Columns) -> Overlays:
        """Only what some columns need; without entries all draws are alike."""
        other = shallow_copy(self)
        other._scalars = [n for n in self._scalars if columns.of(self.found[n].header.scalars)]
        other._entries = ENTRIES in columns.names
        return other

    def extend(
        self,
        samples: list[Sample],
        *,
        unit: int,
        rows: Sequence[int],
        draw: int,
        codec: SignalCodec,
    ) -> list[Sample]:
        """The samples of a unit's rows with the entries of a draw and all scalars.

        ``codec`` is that of the store's own signal. Raises CorruptShardError if a row of an overlay
        is damaged or not its sample's, and UsageError if there is no such draw.
        """
        for name in self._names(draw):
            samples = self.reader(name, codec).extend(samples, unit, rows)
        return samples

    def prefetch(
        self,
        background: Background,
        *,
        unit: int,
        rows: Sequence[int],
        draw: int,
        codec: SignalCodec,
    ) -> None:
        """Begin to read what ``extend`` will need."""
        for name in self._names(draw):
            self.reader(name, codec).prefetch(background, unit, rows)

    def reserve(self, **least: int) -> None:
        """Keep at least so many shards and row groups of each overlay."""
        self._reserved = least
        for reader in self._readers.values():
            reader.reserve(**least)

    def reader(self, name: str, codec: SignalCodec) -> OverlayReader:
        """The reader of one overlay that was found, complete or not."""
        if name not in self._readers:
            reader = OverlayReader(self.found[name], codec, files=self._files)
            reader.reserve(**self._reserved)
            self._readers.setdefault(name, reader)
        return self._readers[name]

    def close(self) -> None:
        """Close all shards; a later read opens them anew."""
        for reader in self._readers.values():
            reader.close()

    def _names(self, draw: int) -> list[str]:
        if draw == 0 or not self._entries:
            return self._scalars
        return [self._name_of(draw), *self._scalars]

    def _name_of(self, draw: int) -> str:
        if draw in self._draws:
            return self._draws[draw]
        partial = [o for o in self.found.values() if o.header.draw == draw]
        raise UsageError(
            f"draw {draw} is incomplete" if partial else f"the store has no draw {draw}",
            where=", ".join(overlay.folder.url for overlay in partial) or None,
            expected="one of " + ", ".join(map(str, [0, *sorted(self._draws)])),
            got=", ".join(overlay.progress for overlay in partial) or draw,
            todo=f"add it: kdstore dump … --overlay NAME --draw {draw}",
        )


class OverlayReader:
    """The committed rows of one overlay; a shard is opened when one is needed.

    ``codec`` is that of the store's own signal: it knows the selection and the id order.
    """

    def __init__(
        self, overlay: Overlay, codec: SignalCodec, *, files: ShardFiles | None = None
    ) -> None:
        self.overlay = overlay
        self._cache = ShardCache(overlay.folder, files=files)
        signal = overlay.header.identity["signal"]
        self._decoder = RowDecoder(overlay.header, overlay_codec(overlay, codec), signal)

    def reserve(self, **least: int) -> None:
        """Keep at least so many shards and row groups."""
        self._cache.reserve(**least)

    def extend(self, samples: Sequence[Sample], unit: int, rows: Sequence[int]) -> list[Sample]:
        """The samples of a unit's rows with another draw's entries, or with more scalars.

        Raises CorruptShardError if a row of the overlay is damaged or not its sample's.
        """
        added = self.additions(samples, unit, rows)
        return [self._extended(*pair) for pair in zip(samples, added, strict=True)]

    def additions(
        self, samples: Sequence[Sample], unit: int, rows: Sequence[int]
    ) -> list[SparseSignal]:
        """What the rows hold: entries without scalars, or scalars without entries."""
        shard, record = self.shard(unit), self._record(unit)
        found: dict[int, SparseSignal] = {}
        for group, members in by_group(shard, rows).items():
            places = [rows[n] - int(shard.first_rows[group]) for n in members]
            some = [samples[n] for n in members]
            added = self._cache.read(
                record,
                self._decoder,
                group,
                partial(ShardReader.additions, group=group, places=places, samples=some),
            )
            found.update(zip(members, added, strict=True))
        return [found[n] for n in range(len(rows))]

    def prefetch(self, background: Background, unit: int, rows: Sequence[int]) -> None:
        """Begin to read what the rows hold."""
        self._cache.prefetch(background, self._record(unit), self._decoder, rows)

    def _extended(self, sample: Sample, added: SparseSignal) -> Sample:
        signal = sample.signal
        if signal is None:
            return replace(sample, signal=added)
        if self.overlay.header.draw:
            return replace(sample, signal=replace(added, scalars=signal.scalars))
        new = {name: v for name, v in added.scalars.items() if name not in signal.scalars}
        return replace(sample, signal=replace(signal, scalars={**signal.scalars, **new}))

    def shard(self, unit: int) -> ShardReader:
        """The opened shard of a unit."""
        return self._cache.shard(self._record(unit), self._decoder)

    def close(self) -> None:
        """Close all shards; a later read opens them anew."""
        self._cache.close()

    def _record(self, unit: int) -> ShardRecord:
        return self.overlay.commits.record(unit)


def overlay_codec(overlay: Overlay, codec: SignalCodec) -> SignalCodec:
    """The codec of an overlay, beside ``codec`` of the store's signal; HeaderError if unknown."""
    header = overlay.header
    name = header.identity["codec"]
    if name == ScalarsCodec.name and not header.draw:
        return ScalarsCodec(codec.selection, order=codec.order, scalars=header.scalars)
    where = overlay.folder.location(OVERLAY_HEADER)
    return codec_named(
        name, codec.selection, order=codec.order, scalars=header.scalars, where=where
    )


def _named(folder: Folder, name: str, header: Header, units: NDArray[np.int64]) -> Overlay:
    overlay = read_overlay(folder, name, header) if is_overlay_name(name) else None
    if overlay is None or not overlay.commits.covers(units):
        raise UsageError(
            f"the overlay {name!r} cannot be read",
            where=folder.url,
            expected="a complete overlay",
            got="no such overlay" if overlay is None else overlay.progress,
            todo="see kdstore status; kdstore dump … --overlay adds and completes them",
        )
    return overlay
