"""Arrow IPC files from outside: what compressed buffers declare is checked before they are read.

Arrow gives memory for the length that a compressed buffer begins with, and then finds out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pyarrow as pa

MAX_TABLE_BYTES = 1 << 29
_MAGIC_BYTES = 8  # ARROW1 and padding; then the file is a stream, and a footer
_HEADER, _BUFFERS, _COMPRESSION = 2, 2, 3  # fields of a Message; two of a RecordBatch


def read_ipc(data: bytes) -> pa.Table:
    """The table in an Arrow IPC file's bytes, its offsets checked; Arrow's errors, and ValueError.

    A file is read as the stream that it contains: so what is read is what was looked at.
    """
    num_batches = pa.ipc.open_file(pa.BufferReader(data)).num_record_batches
    stream = pa.py_buffer(data)[_MAGIC_BYTES:]
    sizes = list(_declared_sizes(stream))
    if len(sizes) != num_batches or sum(sizes) > MAX_TABLE_BYTES:
        raise ValueError(
            f"{len(sizes)} batches of {sum(sizes)} bytes, the footer has {num_batches}"
        )
    table = pa.ipc.open_stream(stream).read_all()
    table.validate(full=True)
    return table


def _declared_sizes(stream: pa.Buffer) -> Iterator[int]:
    """Bytes of each record batch after decompression."""
    for message in pa.ipc.MessageReader.open_stream(stream):
        if message.type == "record batch":
            try:
                yield _declared(message.metadata.to_pybytes(), message.body)
            except (struct.error, TypeError) as error:
                raise ValueError("a record batch whose buffers cannot be found") from error
        elif message.type != "schema":
            raise ValueError(f"a message of type {message.type!r}")


def _declared(metadata: bytes, body: pa.Buffer) -> int:
    """Reads two tables of a flatbuffer: https://flatbuffers.dev/internals, Arrow's Message.fbs."""
    batch = _follow(metadata, _field(metadata, _follow(metadata, 0), _HEADER))
    vector = _follow(metadata, _field(metadata, batch, _BUFFERS))
    (count,) = struct.unpack_from("<I", metadata, vector)
    buffers = struct.unpack_from(f"<{2 * count}q", metadata, vector + 4)
    if _field(metadata, batch, _COMPRESSION) is None:
        return len(body)
    total = 0
    for offset, length in zip(buffers[::2], buffers[1::2], strict=True):
        (declared,) = struct.unpack_from("<q", body, offset) if length else (0,)
        if declared < -1 or length < 0:
            raise ValueError(f"a buffer of {declared} bytes")
        total += length if declared == -1 else declared
    return total


def _follow(data: bytes, at: int | None) -> int:
    (step,) = struct.unpack_from("<I", data, at)  # type: ignore[arg-type]
    return int(at + step)


def _field(data: bytes, table: int, index: int) -> int | None:
    """Where a field of a table lies, None if it is absent."""
    (back,) = struct.unpack_from("<i", data, table)
    (size,) = struct.unpack_from("<H", data, table - back)
    if 4 + 2 * index >= size:
        return None
    (offset,) = struct.unpack_from("<H", data, table - back + 4 + 2 * index)
    return table + int(offset) if offset else None
