"""Several stores as one source of batches, each with its share."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kdstore.errors import StoreMismatchError, UsageError

if TYPE_CHECKING:
    from kdstore.readers.loader import Loader
    from kdstore.readers.samples import Index, Samples
    from kdstore.sample import Sample


@dataclass(frozen=True)
class Part:
    """A store of a mixture: the number of its first sample, and what it gives an epoch."""

    data: Samples
    first: int
    samples_per_epoch: int


class Mixture:
    """Samples of several stores; each batch is of one of them, in turn by their shares.

    ``weights``: shares of the samples of an epoch, which has as many as all stores together.
    ``repeat``: passes through each store an epoch, such as 2 or 0.5. ``choose``: samples of each an
    epoch. One of them. A store goes through all its samples before one comes again, whatever the
    epochs of the mixture are; shares hold to within a batch.

    The stores may have different selections and scalars, but one vocabulary: raises
    StoreMismatchError otherwise.
    """

    def __init__(
        self,
        stores: Sequence[Samples],
        *,
        weights: Sequence[float] | None = None,
        repeat: Sequence[float] | None = None,
        choose: Sequence[int] | None = None,
    ) -> None:
        self.stores = list(stores)
        _check_vocabularies(self.stores)
        counts = _samples_per_epoch(self.stores, weights=weights, repeat=repeat, choose=choose)
        self._firsts = np.cumsum([0, *map(len, self.stores)]).tolist()
        triples = zip(self.stores, self._firsts[:-1], counts, strict=True)
        self.parts = [Part(*triple) for triple in triples]

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: Index) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Index]) -> list[Sample]:
        """Several samples in the order asked for, numbered through the stores in their order."""
        found: dict[int, Sample] = {}
        for part, wanted in self._by_store(indices).items():
            samples = self.stores[part].__getitems__(list(wanted.values()))
            found.update(zip(wanted, samples, strict=True))
        return [found[n] for n in range(len(indices))]

    def with_columns(self, columns: Sequence[str]) -> Mixture:
        """The same samples, of which each store reads only some columns."""
        counts = [part.samples_per_epoch for part in self.parts]
        return Mixture([store.with_columns(columns) for store in self.stores], choose=counts)

    def reserve(self, **least: int) -> None:
        """Keep at least so many shards open and row groups in memory, of each store."""
        for store in self.stores:
            store.reserve(**least)

    def prefetch(self, indices: Sequence[Index]) -> None:
        """Begin to read what some samples need, in the background, as each store does."""
        for part, wanted in self._by_store(indices).items():
            self.stores[part].prefetch(list(wanted.values()))

    def _by_store(self, indices: Sequence[Index]) -> dict[int, dict[int, Index]]:
        """By number of the store: place in ``indices`` -> index and draw there."""
        by_store: dict[int, dict[int, Index]] = {}
        for n, index in enumerate(indices):
            number, draw = index if isinstance(index, tuple) else (index, 0)
            if not 0 <= number < len(self):
                raise IndexError(f"sample {number} of a mixture of {len(self)}")
            part = bisect_right(self._firsts, number) - 1
            by_store.setdefault(part, {})[n] = (number - self._firsts[part], draw)
        return by_store

    def loader(self, **options: Any) -> Loader:
        """Batches for training; the options are those of ``kdstore.readers.loader.Loader``."""
        from kdstore.readers.loader import Loader

        return Loader(self, **options)


def parts_of(data: Samples | Mixture) -> list[Part]:
    """The parts of a mixture; a store is one, given once an epoch."""
    if isinstance(data, Mixture):
        return data.parts
    return [Part(data, 0, len(data))]


def _samples_per_epoch(stores: Sequence[Samples], **shares: Sequence[float] | None) -> list[int]:
    given = {name: values for name, values in shares.items() if values is not None}
    if len(given) != 1:
        raise UsageError(
            "a mixture needs one of weights, repeat and choose",
            expected="one",
            got=", ".join(given) or "none",
        )
    name, values = next(iter(given.items()))
    finite = all(np.isfinite(value) and value >= 0 for value in values)
    if len(values) != len(stores) or not finite or not sum(values):
        raise UsageError(
            f"{name} of a mixture must be one for each store",
            expected=f"{len(stores)} numbers of at least 0, not all 0",
            got=list(values),
        )
    if name == "choose":
        for value, store in zip(values, stores, strict=True):
            if value and not len(store):
                raise UsageError("nothing to choose from", where=f"{store}", expected=value, got=0)
        return [int(value) for value in values]
    if name == "repeat":
        return [round(value * len(store)) for value, store in zip(values, stores, strict=True)]
    return [round(value / sum(values) * sum(map(len, stores))) for value in values]


def _check_vocabularies(stores: Sequence[Samples]) -> None:
    for store in stores[1:]:
        if store.vocab_digest != stores[0].vocab_digest:
            raise StoreMismatchError(
                "stores of a mixture have different vocabularies",
                where=f"{store}",
                expected=stores[0].vocab_digest,
                got=store.vocab_digest,
                todo="one student has one vocabulary",
            )
