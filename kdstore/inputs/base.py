"""Source: where rows come from. A new kind of data is one subclass and one line in sources.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from kdstore.errors import InputError

Row = dict[str, Any]

# What an input row may carry. Parquet reads no other column, so an embedding column costs nothing.
ROW_FIELDS = (
    "id",
    "input_ids",
    "labels",
    "spans",
    "attention_mask",
    "messages",
    "tools",
    "prompt",
    "completion",
    "text",
    "metadata",
)


class Source(ABC):
    """Rows in a fixed order, numbered from 0 without gaps.

    ``name`` is the short name of default sample ids (``{name}:{row}``), ``location`` the path or
    dataset as the user would write it. The number of a row depends on the data alone, so a plan
    may keep it and a resumed dump may start at any row.
    """

    name: str
    location: str

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """JSON-able identity of the data: equal for equal content, wherever it lies."""

    @abstractmethod
    def _rows_from(self, start: int) -> Iterator[Row]:
        """The rows from number ``start`` on; nothing if there are fewer."""

    def rows(self, start: int = 0) -> Iterator[tuple[int, Row]]:
        """(row number, row) from ``start`` on. Raises InputError if the source has no rows."""
        number = start - 1
        for number, row in enumerate(self._rows_from(start), start):
            yield number, row
        if number < 0:
            raise InputError(
                "no rows in the input",
                where=self.location,
                expected="at least one row",
                got="none",
                todo="check that --data names the right file, directory or split",
            )

    def locate(self, row: int) -> str:
        """Where a row is, in words for an error message."""
        return f"row {row} of {self.location}"
