"""Byte planes: the columns that a codec writes.

A plane holds like bytes of many positions, which is what zstd is good at. Nothing is bit-packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.errors import CorruptShardError


@dataclass(frozen=True, eq=False)
class Plane:
    """Bytes of B samples: ``data`` uint8, sample b at ``offsets[b]:offsets[b + 1]`` (int64)."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        data = np.ascontiguousarray(self.data).view()
        data.flags.writeable = False  # so that kernels are compiled for one kind of array
        object.__setattr__(self, "data", data)

    def cell(self, row: int) -> bytes:
        """The bytes of one sample."""
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes()

    def cells(self) -> list[bytes]:
        """The bytes of each sample."""
        return [self.cell(row) for row in range(len(self.offsets) - 1)]


Planes = Mapping[str, Plane]


def byte_names(name: str, width: int) -> tuple[str, ...]:
    """Names of the planes of a number of fixed width, low byte first: ``lse/0``, ``lse/1``, …"""
    return tuple(f"{name}/{index}" for index in range(width))


def encode_bytes(name: str, values: NDArray[Any], splits: NDArray[np.int64]) -> dict[str, Plane]:
    """One plane for each byte of numbers in a little-endian dtype, bit for bit."""
    width = values.dtype.itemsize
    bytes_NW = np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)
    names = byte_names(name, width)
    return {plane: Plane(bytes_NW[:, index], splits) for index, plane in enumerate(names)}


def decode_bytes(planes: Planes, name: str, *, dtype: str, length: int) -> NDArray[Any]:
    """The numbers again; CorruptShardError unless each plane has ``length`` bytes."""
    names = byte_names(name, np.dtype(dtype).itemsize)
    for plane in names:
        expect_length(plane, planes[plane].data, length)
    bytes_NW = np.stack([planes[plane].data for plane in names], axis=1)
    return bytes_NW.reshape(-1).view(dtype)


def expect_length(name: str, data: Sequence[Any] | NDArray[Any], expected: int) -> None:
    """CorruptShardError unless the plane has the length that the other planes ask for."""
    if len(data) != expected:
        raise CorruptShardError(
            f"plane {name!r} has the wrong length", expected=expected, got=len(data)
        )


class FreshMemory:
    """Where decoded entries go unless a ``Memory`` is given."""

    def empty(self, length: int, *dtypes: Any) -> tuple[NDArray[Any], ...]:
        """Uninitialised arrays of one length."""
        return tuple(np.empty(length, dtype=dtype) for dtype in dtypes)


class Memory(FreshMemory):
    """Arrays of entries in memory that is used again and again.

    Fresh memory costs a page fault every 4 KB, a fifth of the time of decoding. What is decoded
    into a Memory is valid until something else is decoded into it.
    """

    def __init__(self) -> None:
        self._block = np.empty(0, dtype=np.uint8)

    def empty(self, length: int, *dtypes: Any) -> tuple[NDArray[Any], ...]:
        """Uninitialised arrays of one length; those before them are given up."""
        sizes = [length * np.dtype(dtype).itemsize for dtype in dtypes]
        starts = np.cumsum([0, *(-(-size // 64) * 64 for size in sizes)]).tolist()
        if starts[-1] > len(self._block):
            self._block = np.empty(starts[-1] + starts[-1] // 4, dtype=np.uint8)
        parts = zip(starts, sizes, dtypes, strict=False)
        return tuple(self._block[start : start + size].view(dtype) for start, size, dtype in parts)
