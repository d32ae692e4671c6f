"""Parquet files from outside: what they declare is checked before memory is given for it.

Arrow trusts sizes and counts of footers and page headers, and a few bytes can stand for any number
of equal values. So a file is opened with limits, and a column chunk is looked through as Arrow
takes it. The footer that Arrow parses is the very bytes that were given for it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdstore.footer import TAIL_BYTES, read_footer
from kdstore.pages import Chunk, check_pages

MAX_FOOTER_BYTES = 1 << 24
MAX_GROUP_BYTES = 1 << 30
MAX_RATIO = 64
_MAX_CONTAINER = 1 << 16  # elements of a list in a footer: columns, row groups
NULLABLE = ("text", "messages", "metadata")
_VALUE_BYTES = 4  # the least that a plain value takes that is no bool
_CELLS_PER_BYTE = 64  # of a small table's file: equal cells take next to nothing
_UNPACKED = pa.dictionary(pa.int32(), pa.string())  # texts as they are read
Range = tuple[int, int]  # of bytes, half-open


class Source(Protocol):
    """Where a file's bytes come from; ranges that lie closer than a gap are asked for as one."""

    @property
    def size(self) -> int:
        """Of the file, in bytes."""

    @property
    def max_gap_bytes(self) -> int:
        """As many bytes cost less than another range."""

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes ``[start, end)`` of each range, which lie in the file."""


class Memory:
    """A file's bytes, as a source."""

    max_gap_bytes = 0

    def __init__(self, data: bytes) -> None:
        self._data, self.size = data, len(data)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each range."""
        return [self._data[start:end] for start, end in ranges]


class CheckedParquet:
    """A Parquet file, whose row groups are read if what they declare is plausible.

    ``footer`` are the file's last bytes, from the footer to the magic. ``plain``: the pages are to
    be as in a shard, see ``kdstore.pages``. ``options`` are those of pyarrow's ``ParquetFile``.
    Errors are Arrow's, and ValueError. Threads may read at once.
    """

    def __init__(self, source: Source, footer: bytes, *, plain: bool, **options: Any) -> None:
        self.source, self._plain = source, plain
        self._options = {
            "pre_buffer": False,
            "page_checksum_verification": True,
            "thrift_container_size_limit": _MAX_CONTAINER,
            "thrift_string_size_limit": MAX_FOOTER_BYTES,
            **options,
        }
        file = pq.ParquetFile(pa.BufferReader(footer), **self._options)
        self.schema: pa.Schema = file.schema_arrow
        self._metadata = file.metadata
        names = [file.schema.column(index).path for index in range(len(file.schema))]
        self.groups = read_footer(footer, names)

    def read_group(self, group: int, columns: list[str]) -> pa.Table:
        """Some columns of one row group."""
        return self.read_groups([group], columns)[0]

    def read_groups(self, groups: Sequence[int], columns: list[str]) -> list[pa.Table]:
        """Some columns of some row groups, a table each; all their bytes are fetched at once."""
        chunks = {group: self._chunks(group, set(columns)) for group in groups}
        spans = [_span(chunk, self.source.size) for some in chunks.values() for chunk in some]
        ranges = merged(spans, max_gap_bytes=self.source.max_gap_bytes)
        parts = dict(zip(ranges, self.source.read_ranges(ranges), strict=True))
        return [self._table(group, columns, chunks[group], parts) for group in groups]

    def _chunks(self, group: int, wanted: set[str]) -> list[Chunk]:
        rows = self.groups[group].num_rows
        chunks = [chunk for chunk in self.groups[group].chunks if chunk.column in wanted]
        _check_size(chunks)
        for chunk in chunks if self._plain else []:
            _check_plain(chunk, rows)
        return chunks

    def _table(
        self, group: int, columns: list[str], chunks: list[Chunk], parts: dict[Range, bytes]
    ) -> pa.Table:
        source = _CheckedChunks(chunks, parts, plain=self._plain)
        file = pq.ParquetFile(source, metadata=self._metadata, **self._options)
        table = file.read_row_group(group, columns=columns, use_threads=False)
        rows = self.groups[group].num_rows
        if len(table) != rows:
            raise ValueError(f"{len(table)} rows in row group {group}, the footer has {rows}")
        return table


class _CheckedChunks(io.RawIOBase):
    """Parts of a file, whose reads are whole chunks with honest page headers."""

    def __init__(self, chunks: list[Chunk], parts: dict[Range, bytes], *, plain: bool) -> None:
        super().__init__()
        self._parts, self._plain = parts, plain
        self._position, self._size = 0, max((end for _, end in parts), default=0)
        self._chunks: dict[int, list[Chunk]] = {}
        for chunk in chunks:
            self._chunks.setdefault(chunk.start, []).append(chunk)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (0, self._position, self._size)[whence] + offset
        return self._position

    def read(self, size: int | None = -1) -> memoryview:
        at = self._position
        if at not in self._chunks:
            raise ValueError(f"byte {at} does not begin a column")
        start, end = next(span for span in self._parts if span[0] <= at <= span[1])
        stop = end if size is None or size < 0 else min(at + size, end)
        data = memoryview(self._parts[start, end])[at - start : stop - start]
        for chunk in self._chunks[at]:
            check_pages(data, chunk, plain=self._plain)
        self._position = stop
        return data


def merged(spans: Iterable[Range], *, max_gap_bytes: int) -> list[Range]:
    """Ranges that hold all of some, which may overlap; those closer than a gap become one."""
    ranges: list[Range] = []
    for start, end in sorted(spans):
        if ranges and start - ranges[-1][1] <= max_gap_bytes:
            ranges[-1] = ranges[-1][0], max(end, ranges[-1][1])
        else:
            ranges.append((start, end))
    return ranges


def _span(chunk: Chunk, size: int) -> Range:
    end = chunk.start + chunk.compressed_bytes
    if end > size:
        raise ValueError(f"column {chunk.name!r} ends at byte {end} of {size}")
    return chunk.start, end


def read_table(data: bytes, schema: pa.Schema) -> pa.Table:
    """Columns of a small Parquet file of numbers and texts, which are given as dictionaries.

    Equal texts stay one, however often they come. Arrow's errors, and ValueError unless the columns
    are there, of these types, without nulls.

    It is read by this thread alone: ``pq.read_table`` leaves threads behind that hold the bytes;
    one that lets go while the interpreter shuts down aborts the process (seen in 9 of 20 runs).
    """
    footer = data[-TAIL_BYTES - int.from_bytes(data[-TAIL_BYTES:-4], "little") :]
    texts = [field.name for field in schema if field.type == pa.string()]
    file = CheckedParquet(Memory(data), footer, plain=False, read_dictionary=texts)
    for field in schema:
        expected = _UNPACKED if field.name in texts else field.type
        found = file.schema.field(field.name).type if field.name in file.schema.names else None
        if found != expected:
            raise ValueError(f"column {field.name!r} is {found}, not {field.type}")
    rows = sum(group.num_rows for group in file.groups)
    if rows * len(schema) > _CELLS_PER_BYTE * len(data):
        raise ValueError(f"{rows} rows in {len(data)} bytes")
    groups = [file.read_group(group, schema.names) for group in range(len(file.groups))]
    table = pa.concat_tables(groups) if groups else file.schema.empty_table()
    table = table.select(schema.names)
    limit = max(MAX_GROUP_BYTES, MAX_RATIO * len(data))
    if sum(_text_bytes(table[name]) for name in texts) > limit:
        raise ValueError(f"texts of more than {limit} bytes in a file of {len(data)}")
    for name in schema.names:
        if table[name].null_count:
            raise ValueError(f"column {name!r} has {table[name].null_count} nulls")
    table.validate(full=True)  # texts are UTF-8, which Parquet does not see to
    return table


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of a column of texts once each stands for itself."""
    total = 0
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk.dictionary)
        total += pc.sum(lengths.take(chunk.indices).cast(pa.int64())).as_py() or 0
    return total


def _check_size(chunks: list[Chunk]) -> None:
    """ValueError if chunks declare more than memory should be given for."""
    declared = sum(chunk.uncompressed_bytes for chunk in chunks)
    limit = max(MAX_GROUP_BYTES, MAX_RATIO * sum(chunk.compressed_bytes for chunk in chunks))
    if declared > limit:
        raise ValueError(f"a row group of {declared} bytes before compression, {limit} at most")


def _check_plain(chunk: Chunk, rows: int) -> None:
    """ValueError if a chunk of a shard has more values than its bytes can hold.

    Lists may be empty, texts may be null, all else takes room.
    """
    nested = ".list." in chunk.name
    values = chunk.num_values - rows * nested
    least = values // 8 if chunk.is_bool else _VALUE_BYTES * values
    if chunk.name in NULLABLE:
        least = 0
    if least > chunk.uncompressed_bytes or (not nested and chunk.num_values != rows):
        raise ValueError(
            f"column {chunk.name!r} has {chunk.num_values} values in {chunk.uncompressed_bytes} "
            f"bytes and {rows} rows"
        )
