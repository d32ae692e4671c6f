"""``kdstore.open``: one store, or several as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from kdstore.filesystem import Folder
from kdstore.layout import MAIN_SIGNAL
from kdstore.readers.concat import Concatenation
from kdstore.readers.download import shard_files
from kdstore.readers.store import Store

Urls = list[str] | list[Path] | list[str | Path] | tuple[str | Path, ...]


@overload
def open(
    url: str | Path,
    *,
    signal: str = MAIN_SIGNAL,
    overlays: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    cache_bytes: int | None = None,
    **storage_options: Any,
) -> Store: ...


@overload
def open(
    url: Urls,
    *,
    signal: str = MAIN_SIGNAL,
    overlays: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    cache_bytes: int | None = None,
    **storage_options: Any,
) -> Concatenation: ...


def open(
    url: str | Path | Urls,
    *,
    signal: str = MAIN_SIGNAL,
    overlays: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    cache_bytes: int | None = None,
    **storage_options: Any,
) -> Store | Concatenation:
    """The store at a path or fsspec URL, of which one named signal is read; of a list, all as one.

    ``overlays`` names those to read with it; None reads every one that is complete. Shards of a
    remote store are kept whole in ``cache_dir``, of ``cache_bytes`` in all; without one (nor
    ``KDSTORE_CACHE_DIR``) they are read by ranges.

    Raises StoreNotFoundError if there is no store, HeaderError if its header or that of an overlay
    cannot be read, UsageError if a named overlay is missing or incomplete or the cache has no size,
    and StoreMismatchError if the signals of listed stores cannot share a batch.
    """
    files = shard_files(cache_dir, cache_bytes)
    urls = url if isinstance(url, list | tuple) else [url]
    stores = [
        Store(Folder(one, **storage_options), signal=signal, overlays=overlays, files=files)
        for one in urls
    ]
    return Concatenation(stores) if isinstance(url, list | tuple) else stores[0]
