"""Page headers of Parquet column chunks, which no checksum covers.

Arrow gives memory for as many bytes and values as a page header declares, before it has read them.
So the headers are read here first and held against the footer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from kdstore.thrift import Buffer, Fields, read_struct

DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
_PLAIN, _RLE = 0, 3
_TYPE, _UNCOMPRESSED, _COMPRESSED, _CRC, _DATA = 1, 2, 3, 4, 5
_VALUES = {DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}


class Page(NamedTuple):
    """A page header's fields, its own length, and what it says of its page."""

    fields: Fields
    header_bytes: int
    kind: int
    uncompressed_bytes: int
    num_values: int


@dataclass(frozen=True)
class Chunk:
    """What the footer says of a column chunk: where it is, and how much is in it.

    ``bounds`` are its least and its greatest value, as a page holds them; None without statistics.
    """

    name: str
    start: int
    compressed_bytes: int
    uncompressed_bytes: int
    num_values: int
    is_bool: bool
    bounds: tuple[bytes, bytes] | None = None

    @property
    def column(self) -> str:
        """The column that the chunk's values belong to, which may be a list."""
        return self.name.partition(".list.")[0]


def check_pages(data: Buffer, chunk: Chunk, *, plain: bool) -> None:
    """ValueError unless the pages of a chunk are what the footer says of them, together.

    ``plain``: and unless they are as a shard's are, data pages of plain values with a checksum. No
    header has a bit then that could change unseen.
    """
    pages = _pages(data[: chunk.compressed_bytes])
    declared = sum(page.uncompressed_bytes + page.header_bytes for page in pages)
    values = sum(page.num_values for page in pages if page.kind != DICTIONARY_PAGE)
    if (declared, values) != (chunk.uncompressed_bytes, chunk.num_values):
        raise ValueError(
            f"pages of {chunk.name!r} declare {declared} bytes and {values} values, the footer "
            f"{chunk.uncompressed_bytes} and {chunk.num_values}"
        )
    if plain and not all(_is_plain(page.fields) for page in pages):
        raise ValueError(f"a page of {chunk.name!r} is no page of plain values with a checksum")


def _is_plain(fields: Fields) -> bool:
    wanted = {_TYPE, _UNCOMPRESSED, _COMPRESSED, _CRC, _DATA}
    encodings = {key: value for key, value in fields.get(_DATA, {}).items() if key != 1}
    known = set(fields) == wanted and type(fields[_CRC]) is int
    return known and encodings == {2: _PLAIN, 3: _RLE, 4: _RLE}


def _pages(data: Buffer) -> list[Page]:
    pages, at = [], 0
    while at < len(data):
        try:
            fields, end = read_struct(data, at)
            kind = _count(fields[_TYPE])
            num_values = _count(fields[_VALUES[kind]][1])
            uncompressed, size = _count(fields[_UNCOMPRESSED]), _count(fields[_COMPRESSED])
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"no page header at byte {at} of its column") from error
        pages.append(Page(fields, end - at, kind, uncompressed, num_values))
        at = end + size
    if at != len(data):
        raise ValueError(f"pages of {at} bytes in a column of {len(data)}")
    return pages


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"a page header has {value!r} for a count")
    return value
