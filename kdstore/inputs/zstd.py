"""Zstandard files read as a stream that notices when it is cut short."""

from __future__ import annotations

import io
from typing import IO, TYPE_CHECKING

import zstandard

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCK_BYTES = 1 << 17


class ZstdFrames(io.RawIOBase):
    """The content of all frames of a zstd file, one after the other.

    zstandard's own stream reader stops without a word after the first of several frames (what
    ``cat a.zst b.zst`` gives) and where a file was cut. Raises EOFError for the latter.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Number of bytes put into the buffer, 0 at the end."""
        while not self._content and self._more():
            pass
        view = memoryview(buffer)
        size = min(len(view), len(self._content))
        view[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def _more(self) -> bool:
        """Decompresses another block; False at the end of the file."""
        block = self._compressed or self._stream.read(_BLOCK_BYTES)
        self._compressed = b""
        if not block:
            if self._frame is not None:
                raise EOFError("the file ends inside a zstd frame")
            return False
        frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
        self._content = memoryview(frame.decompress(block))
        self._compressed = frame.unused_data
        self._frame = None if frame.eof else frame
        return True
