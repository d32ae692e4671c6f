"""The overlay writer: another draw, or more scalars, beside the shards of a finished store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kdstore
from kdstore.codecs.rows import RUNS, encode_runs
from kdstore.codecs.scalars_only import ScalarsCodec
from kdstore.commits import CommitsByUnit, load_commits
from kdstore.errors import InputError, SignalError, UsageError
from kdstore.filesystem import Folder
from kdstore.header import check_same_identity
from kdstore.layout import (
    MAIN_SIGNAL,
    OVERLAY_HEADER,
    is_overlay_name,
    overlay_path,
    signal_column,
)
from kdstore.overlay import Overlay, OverlayHeader, read_overlay
from kdstore.readers.overlay import overlay_codec
from kdstore.readers.store import Store
from kdstore.sample import Sample
from kdstore.signal import SparseSignal
from kdstore.writers.shard import ShardWriter
from kdstore.writers.units import UnitWriter

_COLUMNS = ("sample_id", "num_scored")


class OverlayWriter(UnitWriter):
    """An overlay of an opened store, and the units of it that are committed."""

    def __init__(self, store: Store, overlay: Overlay) -> None:
        self.store, header = store, overlay.header
        codec = overlay_codec(overlay, store.decoder.codec)
        shards = ShardWriter(header, {MAIN_SIGNAL: codec}, header.draw)
        super().__init__(overlay.folder, header, shards)

    @classmethod
    def open(
        cls,
        store: Store,
        name: str,
        *,
        draw: int = 0,
        scalars: Sequence[str] = (),
        origin: str = "teacher",
    ) -> OverlayWriter:
        """The overlay of a name, of a draw above 0 or of scalars: created, or resumed.

        ``origin`` says who gives the values. Raises StoreMismatchError if there is an overlay of
        that name which is another one, naming the first differing field, and UsageError if the
        store is unfinished or the name, the draw or a scalar is not to be had.
        """
        _check_name(name, store)
        _check_finished(store)
        own = store.decoder.codec
        identity = {
            "store": store.config_digest,
            "signal": MAIN_SIGNAL,
            "codec": own.name if draw else ScalarsCodec.name,
            "draw": draw,
            "scalars": list(scalars),
            "origin": origin,
            "columns": list(_COLUMNS),
            "seed": store.header.identity["seed"],
        }
        overlay = read_overlay(store.folder, name, store.header)
        if overlay is None:
            _check_new(store, draw, scalars)
            overlay = _create(store, name, identity)
        where = overlay.folder.url
        todo = "choose another name, or repeat the settings of the first run to resume it"
        check_same_identity(
            overlay.header.identity, identity, where=where, what="overlay", todo=todo
        )
        return cls(store, overlay)

    def row_groups(self, unit: int, samples: Sequence[Sample]) -> list[list[Sample]]:
        """A unit's samples as the row groups of the store's shard, so that both are read together.

        Raises InputError unless they are the rows of that shard, with the same scored positions.
        """
        shard = self.store.shard(unit)
        ids, runs = shard.column("sample_id"), shard.column(signal_column(MAIN_SIGNAL, RUNS))
        found = [(sample.sample_id, encode_runs([sample]).cell(0)) for sample in samples]
        for row, pair in enumerate(zip_longest(zip(ids, runs, strict=True), found)):
            if pair[0] != pair[1]:
                raise InputError(
                    "an overlay's sample is not the one that the store has in this row",
                    where=f"{shard.where}, row {row}",
                    expected=f"(sample id, runs) = {pair[0]}",
                    got=pair[1],
                    todo="overlay the store with the kdstore version that made it",
                )
        return [list(samples[start:end]) for start, end in pairwise(shard.first_rows)]


def add_scalar(
    url: str | Path,
    name: str,
    values: Callable[[Sample], NDArray[np.float32]],
    **storage_options: Any,
) -> None:
    """Add a scalar of the caller's to a finished store, as an overlay of the same name.

    ``values`` gives float32 [S] for a sample, kept bit for bit. Run it again to resume. Raises
    SignalError for anything else and for NaN, and what ``OverlayWriter.open`` raises.
    """
    store = Store(Folder(url, **storage_options))
    writer = OverlayWriter.open(store, name, scalars=[name], origin="caller")
    for unit in writer.pending_units():
        rows = map(store.__getitem__, range(*store.first_rows[unit : unit + 2].tolist()))
        samples = [_with_scalar(sample, name, values(sample)) for sample in rows]
        provenance = {"kdstore": kdstore.__version__}
        writer.commit(unit, samples, statistics={}, provenance=provenance)
    writer.seal()


def _with_scalar(sample: Sample, name: str, values: Any) -> Sample:
    """The sample with a signal that has no entries, but a scalar."""
    value_S, S = np.asarray(values), sample.num_scored
    if value_S.dtype != np.float32 or value_S.shape != (S,) or np.isnan(value_S).any():
        raise SignalError(
            f"the values of {name!r} cannot be stored",
            where=f"sample {sample.sample_id!r}",
            expected=f"float32 [{S}] without NaN",
            got=f"{value_S.dtype} {list(value_S.shape)}: {value_S[:3]} …",
        )
    signal = SparseSignal.from_arrays("", np.zeros(S + 1), [], [], scalars={name: value_S})
    return replace(sample, signal=signal)


def _create(store: Store, name: str, identity: dict[str, Any]) -> Overlay:
    header = OverlayHeader(identity, {"kind": "fixed", "units": store.header.num_units}, {})
    folder = store.folder.within(overlay_path(name))
    folder.create(OVERLAY_HEADER, header.to_bytes())  # else another worker's stands
    where = folder.location(OVERLAY_HEADER)
    created = OverlayHeader.from_bytes(folder.read(OVERLAY_HEADER), where=where)
    return Overlay(name, folder, created, CommitsByUnit(load_commits(folder, created)))


def _check_name(name: str, store: Store) -> None:
    if not is_overlay_name(name):
        raise UsageError(
            "the overlay's name is not fit for a folder",
            where=store.folder.url,
            expected="1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', the first a letter or digit",
            got=repr(name),
        )


def _check_finished(store: Store) -> None:
    if not store.is_complete:
        raise UsageError(
            "only a finished store can have overlays",
            where=store.folder.url,
            expected=f"{store.header.num_units} committed units",
            got=len(store.commits),
            todo="finish the dump first: run it without --overlay",
        )


def _check_new(store: Store, draw: int, scalars: Sequence[str]) -> None:
    """UsageError if the store has what a new overlay would add, or can have no other draw."""
    if draw < 0 or (draw > 0) == bool(scalars):
        raise UsageError(
            "an overlay adds one draw, or scalars",
            where=store.folder.url,
            expected="a draw above 0, or names of scalars",
            got=f"draw {draw} and scalars {list(scalars)}",
        )
    others = [overlay.header for overlay in store.overlays.found.values()]
    named = [*store.decoder.codec.scalars, *(name for other in others for name in other.scalars)]
    taken = [f"scalar {name!r}" for name in scalars if name in named]
    taken += [f"draw {draw}"] * (draw > 0 and draw in [other.draw for other in others])
    if taken:
        raise UsageError(
            "the store has already what the overlay would add",
            where=store.folder.url,
            expected="another draw, or scalars of other names",
            got=", ".join(taken),
            todo="see kdstore inspect for its overlays",
        )
    _check_sampled(store.decoder.codec.selection, draw)


def _check_sampled(spec: str, draw: int) -> None:
    from kdstore.select import parse_selection  # imports torch

    if draw and not parse_selection(spec).sampled:
        raise UsageError(
            "this selection has no other draws: it gives the same entries each time",
            where=f"--draw {draw}",
            expected="a store of pps or counts",
            got=spec,
        )
