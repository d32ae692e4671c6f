"""Several stores as one: their samples one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdstore.align import TokenTable
from kdstore.errors import StoreMismatchError, UsageError
from kdstore.hashing import sha256_hex
from kdstore.header import first_difference
from kdstore.readers.outline import Outline
from kdstore.readers.samples import Index, Samples
from kdstore.readers.store import Store
from kdstore.sample import Sample


class Concatenation(Samples):
    """The samples of several stores, store by store in the order given.

    Each store keeps its own shards, id order and codec. A sample id may come in more than one
    store: ``find`` gives the first. Draws are those that every store has.

    Raises StoreMismatchError, naming the first field that differs and the two stores, unless their
    signals can share a batch: of one vocabulary and selection, with the same scalars, those of
    overlays included. Raises UsageError without a store.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        if not stores:
            raise UsageError("no stores to read", expected="one URL at least", got="none")
        self.stores = tuple(stores)
        self._check()
        self._number()

    def __repr__(self) -> str:
        return f"Concatenation({len(self.stores)} stores, {len(self)} samples)"

    def __getitems__(self, indices: Sequence[Index]) -> list[Sample]:
        """Several samples in the order asked for; those of one row group are read together.

        Each is a sample of its own, also where an index comes twice.
        """
        found: dict[int, Sample] = {}
        for number, wanted in sorted(self._by_store(indices).items()):
            samples = self.stores[number].__getitems__([index for _, index in wanted])
            found.update(zip((n for n, _ in wanted), samples, strict=True))
        return [found[n] for n in range(len(indices))]

    def with_columns(self, columns: Sequence[str]) -> Concatenation:
        """The same samples, of which only some columns are read; see ``Store.with_columns``."""
        return Concatenation([store.with_columns(columns) for store in self.stores])

    def prefetch(self, indices: Sequence[Index]) -> None:
        """Begin to read what some samples need, in the background, as each store does."""
        for number, wanted in self._by_store(indices).items():
            self.stores[number].prefetch([index for _, index in wanted])

    def reserve(self, *, shards: int = 0, row_groups: int = 0) -> None:
        """Keep at least so many shards open and row groups in memory, of each store."""
        for store in self.stores:
            store.reserve(shards=shards, row_groups=row_groups)

    def outline(self, shard_index: int) -> Outline:
        """Row groups and lengths of the n-th shard of all; each store keeps its last 256.

        Raises CorruptShardError if they are not what was committed.
        """
        number, local = self._store_of(range(self.num_shards)[shard_index])
        return self.stores[number].outline(local)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell which samples these are, in which order."""
        return sha256_hex("\n".join(store.fingerprint for store in self.stores).encode())[:16]

    @property
    def vocab_size(self) -> int:
        """V, the width of the teacher's logits, which is that of every store."""
        return self.stores[0].vocab_size

    @property
    def vocab_digest(self) -> str:
        """Fingerprint of the teachers' token table, which is that of every store."""
        return self.stores[0].vocab_digest

    @property
    def is_complete(self) -> bool:
        """Whether every store has every unit of its plan."""
        return all(store.is_complete for store in self.stores)

    @property
    def num_draws(self) -> int:
        """Draws that every store has: 0 to this number - 1."""
        return min(store.num_draws for store in self.stores)

    def with_signal(self, signal: str) -> Concatenation:
        """The same samples with another signal of the stores; UsageError if one has none."""
        return Concatenation([store.with_signal(signal) for store in self.stores])

    def refresh(self) -> int:
        """Look for units that were committed since, in every store; how many samples are new.

        Samples of later stores move up by what is new in earlier ones: see ``Store.refresh``, which
        also says what is raised.
        """
        try:
            new = sum([store.refresh() for store in self.stores])
            self._check()
        finally:
            self._number()
        return new

    def find(self, sample_id: str) -> int:
        """The first index of a sample's id, by reading id columns; KeyError if there is none."""
        for number, store in enumerate(self.stores):
            try:
                return int(self._first_samples[number]) + store.find(sample_id)
            except KeyError:
                continue
        raise KeyError(sample_id)

    def token_table(self) -> TokenTable:
        """The bytes behind each token id, which are the same in every store."""
        return self.stores[0].token_table()

    def close(self) -> None:
        """Close all shards of all stores; a later read opens them anew."""
        for store in self.stores:
            store.close()

    def _by_store(self, indices: Sequence[Index]) -> dict[int, list[tuple[int, tuple[int, int]]]]:
        """By number of the store: places in ``indices``, and index and draw there."""
        by_store: dict[int, list[tuple[int, tuple[int, int]]]] = {}
        for n, (shard, row, draw) in enumerate(zip(*self._places(indices), strict=True)):
            number, _ = self._store_of(shard)
            local = row - int(self._first_samples[number])
            by_store.setdefault(number, []).append((n, (local, draw)))
        return by_store

    def _number(self) -> None:
        """Number the shards and samples of the stores as they are now."""
        stores = self.stores
        self.shard_rows = np.concatenate([store.shard_rows for store in stores])
        self.shard_tokens = np.concatenate([store.shard_tokens for store in stores])
        self.first_rows = np.append(np.int64(0), np.cumsum(self.shard_rows))
        self._first_shards = np.cumsum([0, *(store.num_shards for store in stores)])
        self._first_samples = self.first_rows[self._first_shards]

    def _store_of(self, shard: int) -> tuple[int, int]:
        """The number of a shard's store, and the shard's number in it."""
        number = int(np.searchsorted(self._first_shards, shard, side="right")) - 1
        return number, shard - int(self._first_shards[number])

    def _check(self) -> None:
        first = self.stores[0]
        for other in self.stores[1:]:
            difference = first_difference(_shared(first), _shared(other))
            if difference is not None:
                name, ours, theirs = difference
                raise StoreMismatchError(
                    f"the stores cannot be read as one: {name} differs",
                    where=f"{first.folder.url} and {other.folder.url}",
                    expected=f"{name} = {ours!r}, as in {first.folder.url}",
                    got=f"{name} = {theirs!r} in {other.folder.url}",
                    todo="open them one by one; overlays=[…] says which overlays to read",
                )


def _shared(store: Store) -> dict[str, Any]:
    """What the signals of one batch must have in common."""
    identity = store.header.identity
    signal = identity["signals"][store.signal]
    scalars = sorted({*signal["scalars"], *store.overlays.scalars})
    return {
        "vocab_digest": identity["vocab_digest"],
        "vocab_size": store.vocab_size,
        f"signals.{store.signal}": {"selection": signal["selection"], "scalars": scalars},
    }
