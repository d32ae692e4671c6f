"""Several teachers' signals of the same samples, joined by sample id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kdstore.align import TokenTable
from kdstore.errors import StoreMismatchError
from kdstore.hashing import sample_hash
from kdstore.readers.outline import Outline
from kdstore.readers.samples import Index, Samples
from kdstore.readers.store import Store
from kdstore.sample import Sample


class Join(Samples):
    """The samples of a store, with what other teachers said of the same: ``sample.teachers[name]``.

    Order, shards and draws are those of ``main``. Each other store must have every one of its
    samples, with the same token ids; it may have more, score other positions, and have another
    selection. It reads as fast as one store where all were planned alike (the same data and
    options, ``--unit-tokens`` among them), else samples are looked up by their ids.

    Raises StoreMismatchError for another vocabulary, and, when a sample is read, where a store
    lacks it or has other token ids.
    """

    def __init__(self, main: Samples, others: Mapping[str, Store]) -> None:
        self.main, self.others = main, dict(others)
        self.in_one_process = main.in_one_process
        self._rows: dict[str, NDArray[np.int64]] = {}
        for name, other in self.others.items():
            if other.vocab_digest != main.vocab_digest:
                raise StoreMismatchError(
                    "teachers to be joined have different vocabularies",
                    where=f"{name}: {other}",
                    expected=main.vocab_digest,
                    got=other.vocab_digest,
                    todo="join teachers of one tokenizer",
                )
        self._take_shards()

    def _take_shards(self) -> None:
        self.shard_rows, self.shard_tokens = self.main.shard_rows, self.main.shard_tokens
        self.first_rows = self.main.first_rows

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rows": {}}

    def __repr__(self) -> str:
        return f"Join({self.main!r}, {', '.join(self.others)})"

    def __getitems__(self, indices: Sequence[Index]) -> list[Sample]:
        """Several samples in the order asked for, each with those of the other teachers."""
        samples = self.main.__getitems__(indices)
        _, rows, draws = self._places(indices)
        by_name = {name: self._partners(name, samples, rows, draws) for name in self.others}
        return [
            replace(sample, teachers={name: some[n] for name, some in by_name.items()})
            for n, sample in enumerate(samples)
        ]

    def _partners(
        self, name: str, samples: Sequence[Sample], rows: list[int], draws: list[int]
    ) -> list[Sample]:
        """The samples of another store that have the ids of these."""
        other = self.others[name]
        wanted = rows if self._alike(other) else self._find(name, samples)
        pairs = zip(wanted, draws, strict=True)
        found = other.__getitems__([(row, draw % other.num_draws) for row, draw in pairs])
        for sample, partner in zip(samples, found, strict=True):
            _check_same(sample, partner, f"{name}: {other}")
        return found

    def _alike(self, other: Store) -> bool:
        """Whether row n of the one store is row n of the other."""
        if not isinstance(self.main, Store):
            return False
        plans = {store.header.identity["plan_digest"] for store in (self.main, other)}
        return len(plans) == 1 and np.array_equal(self.main.commits.units, other.commits.units)

    def _find(self, name: str, samples: Sequence[Sample]) -> list[int]:
        """The rows of samples in another store, all of whose ids are read the first time."""
        other = self.others[name]
        if name not in self._rows:
            hashes = np.array([sample_hash(i) for i in other.sample_ids()], dtype=np.uint64)
            order = np.argsort(hashes, kind="stable")
            self._rows[name] = np.stack([hashes[order].view(np.int64), order])
        hashes, order = self._rows[name]
        found = []
        for sample in samples:
            wanted = np.uint64(sample_hash(sample.sample_id))
            place = int(np.searchsorted(hashes.view(np.uint64), wanted))
            if place == len(order) or hashes.view(np.uint64)[place] != wanted:
                raise StoreMismatchError(
                    "a teacher has not seen a sample",
                    where=f"{name}: {other}",
                    expected=f"sample {sample.sample_id!r}",
                    got=f"{len(order)} other samples",
                    todo="dump the same data with each teacher, or join the smaller store first",
                )
            found.append(int(order[place]))
        return found

    def with_columns(self, columns: Sequence[str]) -> Join:
        """The same samples, of which each store reads only some columns."""
        others = {name: other.with_columns(columns) for name, other in self.others.items()}
        return Join(self.main.with_columns(columns), others)

    def prefetch(self, indices: Sequence[Index]) -> None:
        """Begin to read what some samples need, in the background, where it is known."""
        self.main.prefetch(indices)
        _, rows, draws = self._places(indices)
        pairs = list(zip(rows, draws, strict=True))
        for other in filter(self._alike, self.others.values()):
            other.prefetch([(row, draw % other.num_draws) for row, draw in pairs])

    def reserve(self, *, shards: int = 0, row_groups: int = 0) -> None:
        """Keep at least so many shards open and row groups in memory, of each store."""
        for store in (self.main, *self.others.values()):
            store.reserve(shards=shards, row_groups=row_groups)

    def outline(self, shard_index: int) -> Outline:
        """Row groups and lengths of the n-th shard of ``main``."""
        return self.main.outline(shard_index)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell which samples these are, of which teachers."""
        names = [self.main.fingerprint, *((n, o.fingerprint) for n, o in self.others.items())]
        return xxhash.xxh3_64_hexdigest(repr(names).encode())

    @property
    def vocab_size(self) -> int:
        """V, the width of the main teacher's logits."""
        return self.main.vocab_size

    @property
    def vocab_digest(self) -> str:
        """Fingerprint of the teachers' token table."""
        return self.main.vocab_digest

    @property
    def is_complete(self) -> bool:
        """Whether every unit of each store is committed."""
        return all(store.is_complete for store in (self.main, *self.others.values()))

    @property
    def num_draws(self) -> int:
        """Draws of the main signal; draw r of another is r mod its own number."""
        return self.main.num_draws

    def refresh(self) -> int:
        """Look for what was committed since; how many samples of ``main`` are new."""
        for other in self.others.values():
            other.refresh()
        new = self.main.refresh()
        self._rows = {}
        self._take_shards()
        return new

    def find(self, sample_id: str) -> int:
        """The index of a sample's id, by reading the id columns; KeyError if there is none."""
        return self.main.find(sample_id)

    def token_table(self) -> TokenTable:
        """The bytes behind each token id."""
        return self.main.token_table()

    def close(self) -> None:
        """Close all shards; a later read opens them anew."""
        for store in (self.main, *self.others.values()):
            store.close()


def _check_same(sample: Sample, partner: Sample, where: str) -> None:
    if partner.sample_id != sample.sample_id or not np.array_equal(
        partner.input_ids_T, sample.input_ids_T
    ):
        raise StoreMismatchError(
            "a teacher has seen another text under a sample's id",
            where=f"{where}, sample {partner.sample_id!r}",
            expected=f"{sample.sample_id!r} with token ids {sample.input_ids_T[:8].tolist()} …",
            got=f"token ids {partner.input_ids_T[:8].tolist()} …",
            todo="dump the same data with the same template and options with each teacher",
        )
