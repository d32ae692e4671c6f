"""Parquet files from outside: what they declare is checked before memory is given for it.

Arrow trusts sizes and counts of footers and page headers, and a few bytes can stand for any number
of equal values. So a file is opened with limits, and a column chunk is looked through as Arrow
fetches it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

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


class CheckedParquet:
    """A Parquet file, whose row groups are read if what they declare is plausible.

    ``footer`` are the file's last bytes, from the footer to the magic. ``plain``: the pages are to
    be as in a shard, see ``kdstore.pages``. ``options`` are those of pyarrow's ``ParquetFile``.
    Errors are Arrow's, and ValueError.
    """

    def __init__(self, source: Any, footer: bytes, *, plain: bool, **options: Any) -> None:
        self._source, self._plain = _CheckedSource(source, plain=plain), plain
        self._file = pq.ParquetFile(
            self._source,
            pre_buffer=False,
            page_checksum_verification=True,
            thrift_container_size_limit=_MAX_CONTAINER,
            thrift_string_size_limit=MAX_FOOTER_BYTES,
            **options,
        )
        self.schema: pa.Schema = self._file.schema_arrow
        leaves = self._file.schema
        names = [leaves.column(index).path for index in range(len(leaves))]
        self.groups = read_footer(footer, names)

    def read_group(self, group: int, columns: list[str]) -> pa.Table:
        """Some columns of one row group."""
        rows, wanted = self.groups[group].num_rows, set(columns)
        chunks = [chunk for chunk in self.groups[group].chunks if chunk.column in wanted]
        self._source.expect(chunks)
        _check_size(chunks)
        for chunk in chunks if self._plain else []:
            _check_plain(chunk, rows)
        table = self._file.read_row_group(group, columns=columns, use_threads=False)
        if len(table) != rows:
            raise ValueError(f"{len(table)} rows in row group {group}, the footer has {rows}")
        return table

    def close(self) -> None:
        """Close the file."""
        self._file.close(force=True)


class _CheckedSource(io.RawIOBase):
    """A file whose reads, once chunks are expected, are whole chunks with honest page headers."""

    def __init__(self, source: Any, *, plain: bool) -> None:
        super().__init__()
        self._source, self._plain = source, plain
        self._chunks: dict[int, list[Chunk]] | None = None

    def expect(self, chunks: Iterable[Chunk]) -> None:
        """From now on only these chunks may be read."""
        self._chunks = {}
        for chunk in chunks:
            self._chunks.setdefault(chunk.start, []).append(chunk)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._source.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._source.seek(offset, whence))

    def read(self, size: int | None = -1) -> bytes:
        start = self.tell()
        data = bytes(self._source.read(size))
        if self._chunks is not None and data:
            if start not in self._chunks:
                raise ValueError(f"byte {start} does not begin a column")
            for chunk in self._chunks[start]:
                check_pages(data, chunk, plain=self._plain)
        return data


def read_table(data: bytes) -> pa.Table:
    """The table in a small Parquet file's bytes; Arrow's errors, and ValueError.

    It is read by this thread alone: ``pq.read_table`` leaves threads behind that hold the bytes;
    one that lets go while the interpreter shuts down aborts the process (seen in 9 of 20 runs).
    """
    footer = data[-TAIL_BYTES - int.from_bytes(data[-TAIL_BYTES:-4], "little") :]
    schema = CheckedParquet(pa.BufferReader(data), footer, plain=False).schema
    if not set(schema.types) <= {pa.int32(), pa.int64(), pa.string()}:
        raise ValueError(f"columns of types {schema.types}")
    texts = [field.name for field in schema if field.type == pa.string()]
    file = CheckedParquet(pa.BufferReader(data), footer, plain=False, read_dictionary=texts)
    limit = max(MAX_GROUP_BYTES, MAX_RATIO * len(data))
    rows = sum(group.num_rows for group in file.groups)
    if rows * len(file.schema) > _CELLS_PER_BYTE * len(data):
        raise ValueError(f"{rows} rows in {len(data)} bytes")
    groups = [file.read_group(g, file.schema.names) for g in range(len(file.groups))]
    table = pa.concat_tables(groups) if groups else file.schema.empty_table()
    if sum(_text_bytes(table[name]) for name in texts) > limit:
        raise ValueError(f"texts of more than {limit} bytes in a file of {len(data)}")
    return table.cast(schema)


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
