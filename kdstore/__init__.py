"""kdstore: the store for teacher signals in language-model knowledge distillation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kdstore.errors import KDStoreError
from kdstore.sample import Sample, Span
from kdstore.signal import SparseSignal

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch, Collator
    from kdstore.readers.concat import Concatenation
    from kdstore.readers.dataset import BatchDataset, PositionFilter
    from kdstore.readers.explode import explode
    from kdstore.readers.join import Join
    from kdstore.readers.mixture import Mixture
    from kdstore.readers.opening import open
    from kdstore.readers.sampler import BatchSampler
    from kdstore.readers.scan import scan
    from kdstore.readers.store import Store
    from kdstore.readers.weights import TokenWeights
    from kdstore.train import losses

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BatchDataset",
    "BatchSampler",
    "Collator",
    "Concatenation",
    "Join",
    "KDStoreError",
    "Mixture",
    "PositionFilter",
    "Sample",
    "Span",
    "SparseSignal",
    "Store",
    "TokenWeights",
    "__version__",
    "explode",
    "losses",
    "open",
    "scan",
]

_LAZY = {
    "Batch": ("kdstore.readers.collate", "Batch"),
    "BatchDataset": ("kdstore.readers.dataset", "BatchDataset"),
    "BatchSampler": ("kdstore.readers.sampler", "BatchSampler"),
    "Collator": ("kdstore.readers.collate", "Collator"),
    "Concatenation": ("kdstore.readers.concat", "Concatenation"),
    "Join": ("kdstore.readers.join", "Join"),
    "Mixture": ("kdstore.readers.mixture", "Mixture"),
    "PositionFilter": ("kdstore.readers.dataset", "PositionFilter"),
    "Store": ("kdstore.readers.store", "Store"),
    "TokenWeights": ("kdstore.readers.weights", "TokenWeights"),
    "explode": ("kdstore.readers.explode", "explode"),
    "losses": ("kdstore.train.losses", None),
    "open": ("kdstore.readers.opening", "open"),
    "scan": ("kdstore.readers.scan", "scan"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kdstore' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
