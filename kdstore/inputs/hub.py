"""Hugging Face ``datasets``: a directory written by ``save_to_disk``, or a dataset's name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

from kdstore.errors import InputError, MissingDependencyError
from kdstore.inputs.base import Row, Source

_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


class DatasetSource(Source):
    """Rows of a ``datasets.Dataset``, streamed from its Arrow files."""

    def __init__(self, dataset: Any, *, kind: str, name: str, location: str) -> None:
        self._dataset = dataset.with_format(None)
        self._kind = kind
        self.name = name
        self.location = location

    def fingerprint(self) -> dict[str, Any]:
        """Kind, name, number of rows, columns and the dataset's own fingerprint."""
        return {
            "kind": self._kind,
            "name": self.name,
            "rows": len(self._dataset),
            "columns": sorted(self._dataset.column_names),
            "dataset_fingerprint": self._dataset._fingerprint,
        }

    def _rows_from(self, start: int) -> Iterator[Row]:
        if start < len(self._dataset):
            yield from self._dataset.skip(start)


def open_saved(location: str, *, split: str, name: str) -> DatasetSource:
    """A directory written by ``save_to_disk``; of a DatasetDict, its ``split``.

    Raises InputError if the directory cannot be read or has no such split.
    """
    datasets = _datasets(location)
    try:
        loaded = datasets.load_from_disk(location)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "cannot load the saved dataset",
            where=location,
            expected="a directory written by datasets' save_to_disk",
            got=f"{type(error).__name__}: {error}",
            todo="write it again with save_to_disk",
        ) from error
    return DatasetSource(
        _one_split(loaded, split, location), kind="saved", name=name, location=location
    )


def open_named(data: str, *, split: str, looked_for: str) -> DatasetSource:
    """The split of a dataset by its name, ``NAME`` or ``NAME:CONFIG``.

    Raises InputError, saying also what was looked for before, if there is none.
    """
    match = _NAME.fullmatch(data)
    assert match is not None, data
    datasets = _datasets(data)
    try:
        loaded = datasets.load_dataset(match["name"], match["config"], split=split)
    except Exception as error:  # network, cache, builder: each library below has its own family
        raise InputError(
            "no input of this name",
            where=data,
            expected=f"{looked_for}, or a dataset of the Hugging Face hub with split {split!r}",
            got=f"{type(error).__name__}: {error}",
            todo="check the spelling; a dataset name needs the network or a filled cache",
        ) from error
    return DatasetSource(
        loaded,
        kind="dataset",
        name=match["name"].rpartition("/")[2],
        location=f"{data} (split {split})",
    )


def is_dataset_name(data: str) -> bool:
    """Whether a string could be ``NAME``, ``OWNER/NAME`` or either with ``:CONFIG``."""
    return _NAME.fullmatch(data) is not None and not data.startswith(".")


def _one_split(loaded: Any, split: str, location: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split in loaded:
        return loaded[split]
    raise InputError(
        "the saved dataset has no such split",
        where=location,
        expected=f"one of {sorted(loaded)}",
        got=split,
        todo="name one of its splits",
    )


def _datasets(location: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise MissingDependencyError(
            "neither a file nor a directory of files, and a dataset needs the package `datasets`",
            where=location,
            got=error,
            todo="pip install kdstore[datasets]",
        ) from error
