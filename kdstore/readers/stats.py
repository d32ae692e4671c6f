"""What a store holds and where its bytes go, from commits and shard footers alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from kdstore.codecs.rows import RUNS
from kdstore.codecs.scalars import scalar_planes
from kdstore.layout import AUDIT_SIGNAL, COMMITS, MAIN_SIGNAL, signal_column
from kdstore.readers.store import Store

_STATISTICS = ("entries", "kept_mass", "audited")


def store_stats(store: Store) -> dict[str, Any]:
    """Counts, means and bytes of a store and its signal ``main``, ready for JSON.

    ``bytes_total`` is the size of all shards, overlays' included, ``bytes_store`` that of every
    file. ``bytes_per_position`` divides by scored positions: ``total`` = ``signal`` + ``scalars`` +
    ``audit`` + ``input_ids`` + ``overlays`` + ``other``. Means are of what the teacher gave, before
    any rounding. Raises CorruptShardError for a shard whose footer is damaged.
    """
    store = store.with_signal(MAIN_SIGNAL)
    scored = int(store.commits.numbers("scored").sum())
    bytes_total = int(store.commits.numbers("bytes").sum()) + _overlay_bytes(store)
    sums, scalar_sums = _teacher_sums(store)
    return {
        "num_samples": len(store),
        "num_tokens": int(store.shard_tokens.sum()),
        "num_scored": scored,
        "num_audited": sums["audited"],
        "num_units": store.num_shards,
        "num_units_planned": store.header.num_units,
        "complete": store.is_complete,
        "selection": store.decoder.codec.selection,
        "bytes_total": bytes_total,
        "bytes_store": bytes_total + _bookkeeping_bytes(store),
        "bytes_per_position": _bytes_per_position(store, bytes_total, scored),
        "entries_per_position": sums["entries"] / max(scored, 1),
        "kept_mass": sums["kept_mass"] / max(scored, 1),
        "mean_scalars": {name: total / max(scored, 1) for name, total in scalar_sums.items()},
        "padding_mass": sums["padding_mass"] / max(scored, 1),
    }


def _bytes_per_position(store: Store, bytes_total: int, scored: int) -> dict[str, Any]:
    columns = _column_bytes(store)
    codec, signal = store.decoder.codec, store.signal
    scalars = {signal_column(signal, plane) for plane in scalar_planes(codec.scalars)}
    entries = {signal_column(signal, plane) for plane in (RUNS, *codec.entry_planes)}
    audit = signal_column(AUDIT_SIGNAL, "")
    parts = {
        "total": bytes_total,
        "signal": sum(columns[name] for name in entries),
        "scalars": sum(columns[name] for name in scalars),
        "audit": sum(columns[name] for name in columns if name.startswith(audit)),
        "input_ids": columns["input_ids"],
        "overlays": _overlay_bytes(store),
    }
    parts["other"] = 2 * parts["total"] - sum(parts.values())
    divisor = max(scored, 1)
    per_column = {name: size / divisor for name, size in sorted(columns.items())}
    return {**{name: size / divisor for name, size in parts.items()}, "columns": per_column}


def _overlay_bytes(store: Store) -> int:
    overlays = store.overlays.found.values()
    return sum(int(overlay.commits.ordered.numbers("bytes").sum()) for overlay in overlays)


def _column_bytes(store: Store) -> Counter[str]:
    """Compressed bytes of each top-level column over all shards."""
    sizes: Counter[str] = Counter()
    for index in range(store.num_shards):
        sizes += store.shard(index).column_bytes()
    return sizes


def _bookkeeping_bytes(store: Store) -> int:
    """Bytes of everything but shards, of the store and of its overlays."""
    total = sum(store.folder.size(path) for path in store.header.files if "/" in path)
    for folder in (store.folder, *(o.folder for o in store.overlays.found.values())):
        files = [name for name in folder.names() if "." in name[1:] and name[0] != "."]
        files += [f"{COMMITS}/{name}" for name in folder.names(COMMITS) if name[0] != "."]
        total += sum(map(folder.size, files))
    return total


def _teacher_sums(store: Store) -> tuple[Counter[str], Counter[str]]:
    """What commits say of all scored positions, summed; and the sums of their scalars by name."""
    sums: Counter[str] = Counter()
    scalars: Counter[str] = Counter()
    for commit in store.commits:
        lost = commit.provenance.get("padding_mass", 0.0) * commit.shard.scored
        sums.update({name: commit.statistics.get(name, 0) for name in _STATISTICS})
        sums.update({"padding_mass": lost})
        scalars.update(commit.statistics.get("scalar_sums", {}))
    return sums, scalars
