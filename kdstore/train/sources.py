"""What a run is trained on: the stores of its configuration, opened and looked at."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

import kdstore
from kdstore.errors import UsageError
from kdstore.readers.concat import Concatenation
from kdstore.readers.join import Join
from kdstore.readers.mixture import Mixture
from kdstore.signal import SparseSignal, TorchSignal
from kdstore.train.objective import Objective
from kdstore.train.online import OnlineSamples

if TYPE_CHECKING:
    from kdstore.readers.samples import Samples
    from kdstore.readers.store import Store
    from kdstore.train.config import TrainConfig


def open_data(config: TrainConfig, *, quiet: bool = False) -> Samples | Mixture:
    """The samples of ``store`` or ``teacher``, with other ``teachers`` joined, or of ``mixture``.

    Says on standard error which stores are unfinished. Raises StoreNotFoundError,
    StoreMismatchError if they cannot be read together, and UsageError where nothing is committed;
    of a teacher, what ``OnlineSamples`` raises.
    """
    if config.mixture is not None:
        data: Samples | Mixture = Mixture(
            [_open(member.store, config) for member in config.mixture],
            weights=[member.weight for member in config.mixture],
        )
    else:
        data = _open_main(config, quiet=quiet)
        if config.teachers:
            others = {name: _open(url, config) for name, url in config.teachers.items()}
            data = Join(data, others)  # type: ignore[arg-type]
    return data


def online_in(data: Any) -> OnlineSamples | None:
    """The online teacher's samples among the data, if one is asked."""
    main = data.main if isinstance(data, Join) else data
    return main if isinstance(main, OnlineSamples) else None


def stores_of(data: Any) -> list[Store]:
    """The stores behind samples, in the order of the configuration, other teachers' last.

    That of an online teacher has what is recorded, which may be nothing.
    """
    if isinstance(data, OnlineSamples):
        return [data.store]
    if isinstance(data, Mixture | Concatenation):
        return [store for part in data.stores for store in stores_of(part)]
    if isinstance(data, Join):
        return [*stores_of(data.main), *data.others.values()]
    return [data]


def check_losses(losses: Mapping[str, Any], data: Any) -> None:
    """UsageError or SignalError, before anything is read, if stored signals will not do."""
    objective = Objective(losses)
    others = data.others if isinstance(data, Join) else {}
    for name, store in others.items():
        objective.check(_empty_signal(store), teacher=name)
    for store in stores_of(data.main if isinstance(data, Join) else data):
        objective.check(_empty_signal(store))


def _empty_signal(store: Store) -> TorchSignal:
    """No positions, of the store's selection and with its scalars."""
    scalars = {name: np.zeros(0) for name in store.scalars}
    return SparseSignal.from_arrays(store.selection, [0], [], [], scalars=scalars).to_torch()


def describe_data(data: Samples | Mixture) -> dict[str, Any]:
    """``num_samples``, ``num_tokens``, ``store_complete`` and ``config_digest`` of all stores.

    The digests of several are joined by ``+``. Of an online teacher also ``teacher``, its path, and
    ``record``; its digest is that of a store that it would fill.
    """
    stores = stores_of(data)
    members = data.stores if isinstance(data, Mixture) else [data]
    online = online_in(data)
    asked: dict[str, Any] = {}
    if online is not None:
        online.refresh()  # other ranks record as well
        asked = {"teacher": online.config.path, "record": online.config.record}
    return {
        **asked,
        "num_samples": len(data),
        "num_tokens": sum(int(member.shard_tokens.sum()) for member in members),
        "store_complete": all(member.is_complete for member in members),
        "config_digest": "+".join(store.config_digest for store in stores),
    }


def _open_main(config: TrainConfig, *, quiet: bool) -> Samples:
    if config.teacher is not None:
        return OnlineSamples(
            config.teacher,
            quiet=quiet,
            cache_dir=config.cache_dir,
            cache_bytes=config.cache_bytes,
        )
    assert config.store is not None
    return _open(config.store, config)


def _open(url: str | list[str], config: TrainConfig) -> Samples:
    samples: Samples = kdstore.open(
        url,
        cache_dir=config.cache_dir,
        cache_bytes=config.cache_bytes,
    )
    if not len(samples):
        raise UsageError(
            "the store has no committed samples",
            where=url if isinstance(url, str) else ", ".join(url),
            expected="at least one committed unit",
            got=0,
            todo="let kdstore dump finish first",
        )
    for store in stores_of(samples):
        _warn_unfinished(store)
    return samples


def _warn_unfinished(store: Store) -> None:
    if not store.is_complete:
        print(
            f"kdstore: warning: the store {store.folder.url} is unfinished, {len(store.commits)} "
            f"of {store.header.num_units} units; training on the samples that are committed now",
            file=sys.stderr,
        )
