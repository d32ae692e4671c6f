"""What a store holds and where its bytes go, from commits and shard footers alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from kdstore.codecs.rows import RUNS
from kdstore.codecs.scalars import scalar_planes
from kdstore.layout import AUDIT_SIGNAL, COMMITS, MAIN_SIGNAL, signal_column
from kdstore.readers.store import Store


def store_stats(store: Store) -> dict[str, Any]:
    """Counts, means and bytes of a store and its signal ``main``, ready for JSON.

    ``bytes_total`` is the size of all shards, overlays' included, ``bytes_store`` that of every
    file. ``bytes_per_position`` divides by scored positions: ``total`` = ``signal`` + ``scalars`` +
    ``audit`` + ``input_ids`` + ``overlays`` + ``other``. Means are of what the teacher gave, before
    any rounding. Raises CorruptShardError for a shard whose footer is damaged.
    """
    store = store.with_signal(MAIN_SIGNAL)
    shards = [commit.shard for commit in store.commits]
    scored = sum(shard.scored for shard in shards)
    bytes_total = sum(shard.bytes for shard in shards) + _overlay_bytes(store)
    return {
        "num_samples": len(store),
        "num_tokens": sum(shard.tokens for shard in shards),
        "num_scored": scored,
        "num_audited": sum(commit.statistics.get("audited", 0) for commit in store.commits),
        "num_units": len(shards),
        "num_units_planned": store.header.num_units,
        "complete": store.is_complete,
        "selection": store.decoder.codec.selection,
        "bytes_total": bytes_total,
        "bytes_store": bytes_total + _bookkeeping_bytes(store),
        "bytes_per_position": _bytes_per_position(store, bytes_total, scored),
        "entries_per_position": _mean(store, "entries", scored),
        "kept_mass": _mean(store, "kept_mass", scored),
        "mean_scalars": _mean_scalars(store, scored),
        "padding_mass": _padding_mass(store, scored),
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
    return sum(commit.shard.bytes for o in overlays for commit in o.commits.values())


def _column_bytes(store: Store) -> Counter[str]:
    """Compressed bytes of each top-level column over all shards."""
    sizes: Counter[str] = Counter()
    for index in range(len(store.commits)):
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


def _mean(store: Store, name: str, scored: int) -> float:
    total: float = sum(commit.statistics.get(name, 0) for commit in store.commits)
    return total / max(scored, 1)


def _mean_scalars(store: Store, scored: int) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for commit in store.commits:
        sums.update(commit.statistics.get("scalar_sums", {}))
    return {name: total / max(scored, 1) for name, total in sums.items()}


def _padding_mass(store: Store, scored: int) -> float:
    lost: float = sum(
        commit.provenance.get("padding_mass", 0.0) * commit.shard.scored for commit in store.commits
    )
    return lost / max(scored, 1)
