"""What a Parquet footer says of column chunks, read without Arrow.

pyarrow's own view of a column chunk ends the process where C++ throws, which size statistics of the
wrong length make it do (pyarrow 26; found by ``benchmarks/fuzz.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdstore.pages import Chunk
from kdstore.thrift import Fields, read_struct

TAIL_BYTES = 8  # the footer's length, and the magic
_MAGIC = b"PAR1"
_NUM_ROWS, _GROUPS = 3, 4  # of the file
_COLUMNS, _GROUP_ROWS = 1, 3  # of a row group
_COLUMN = {2: "place", 3: "metadata", 4: "index", 5: "index", 6: "index", 7: "index"}
_TYPE, _VALUES, _UNCOMPRESSED, _COMPRESSED, _DATA_PAGE, _DICTIONARY = 1, 5, 6, 7, 9, 11
_STATISTICS, _GREATEST, _LEAST = 12, 5, 6
_LONG = 6


@dataclass(frozen=True)
class RowGroup:
    """Rows of a row group, and its column chunks in the order of the schema's leaves."""

    num_rows: int
    chunks: list[Chunk]


def read_footer(footer: bytes, names: list[str]) -> list[RowGroup]:
    """The row groups of a file whose last bytes these are; ``names`` are the schema's leaves.

    Raises ValueError unless the bytes are exactly a footer whose numbers can be.
    """
    length = int.from_bytes(footer[-TAIL_BYTES:-4], "little")
    if footer[-4:] != _MAGIC or length != len(footer) - TAIL_BYTES:
        raise ValueError(f"a footer of {len(footer)} bytes that says {length + TAIL_BYTES}")
    try:
        fields, _ = read_struct(footer[:-TAIL_BYTES])
        groups = [_row_group(group, names) for group in fields[_GROUPS]]
        num_rows = _long(fields[_NUM_ROWS])
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("a footer that lacks a field, or ends early") from error
    if sum(group.num_rows for group in groups) != num_rows:
        raise ValueError(f"{len(groups)} row groups do not have {num_rows} rows together")
    return groups


def _row_group(fields: Fields, names: list[str]) -> RowGroup:
    columns = fields[_COLUMNS]
    if len(columns) != len(names):
        raise ValueError(f"{len(columns)} columns in a row group, {len(names)} in the schema")
    chunks = [_chunk(column, name) for column, name in zip(columns, names, strict=True)]
    return RowGroup(_long(fields[_GROUP_ROWS]), chunks)


def _chunk(column: Fields, name: str) -> Chunk:
    if not column.keys() <= _COLUMN.keys():  # another file, or a key to decrypt it by
        raise ValueError(f"column {name!r} does not lie in the file as it is")
    fields = column[3]
    start = _long(fields[_DATA_PAGE])
    dictionary = _long(fields[_DICTIONARY]) if _DICTIONARY in fields else 0
    return Chunk(
        name,
        dictionary if 0 < dictionary < start else start,
        _long(fields[_COMPRESSED]),
        _long(fields[_UNCOMPRESSED]),
        _long(fields[_VALUES]),
        fields[_TYPE] == 0,
        _bounds(fields.get(_STATISTICS, {})),
    )


def _bounds(statistics: Fields) -> tuple[bytes, bytes] | None:
    match statistics.get(_LEAST), statistics.get(_GREATEST):
        case bytes(least), bytes(greatest):
            return least, greatest
    return None


def _long(value: Any) -> int:
    kind, number = value
    if kind != _LONG or not 0 <= number < 1 << 62:
        raise ValueError(f"a footer has {value!r} for a size or count")
    return int(number)
