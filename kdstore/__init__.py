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
    from kdstore.readers.opening import open
    from kdstore.readers.store import Store
    from kdstore.train import losses

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Collator",
    "Concatenation",
    "KDStoreError",
    "Sample",
    "Span",
    "SparseSignal",
    "Store",
    "__version__",
    "losses",
    "open",
]

_LAZY = {
    "Batch": ("kdstore.readers.collate", "Batch"),
    "Collator": ("kdstore.readers.collate", "Collator"),
    "Concatenation": ("kdstore.readers.concat", "Concatenation"),
    "Store": ("kdstore.readers.store", "Store"),
    "losses": ("kdstore.train.losses", None),
    "open": ("kdstore.readers.opening", "open"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kdstore' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
