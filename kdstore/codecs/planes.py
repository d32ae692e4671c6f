"""Byte planes: the columns that a codec writes, and how integers split into them.

A plane holds like bytes of many positions, which is what zstd is good at: the low bytes of all
gaps in one, the high bytes in another. Integers are never bit-packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.errors import CorruptShardError, SignalError


@dataclass(frozen=True, eq=False)
class Plane:
    """Bytes of B samples: ``data`` uint8, sample b at ``offsets[b]:offsets[b + 1]`` (int64)."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def cell(self, row: int) -> bytes:
        """The bytes of one sample."""
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes()


Planes = Mapping[str, Plane]


def byte_width(max_value: int) -> int:
    """Bytes that hold every integer from 0 to ``max_value``."""
    return max(1, (int(max_value).bit_length() + 7) // 8)


def plane_names(name: str, width: int) -> tuple[str, ...]:
    """Names of an integer's planes, low byte first: ``gap0``, ``gap1``, …"""
    return tuple(f"{name}{index}" for index in range(width))


def split_integers(
    name: str, values: NDArray[Any], *, width: int, splits: NDArray[np.int64]
) -> dict[str, Plane]:
    """Planes of non-negative integers; sample b owns values ``splits[b]:splits[b + 1]``.

    Raises SignalError if a value does not fit: a bit is never masked away.
    """
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= 1 << (8 * width)):
        raise SignalError(
            f"a value of {name!r} does not fit its planes",
            expected=f"0 to {(1 << (8 * width)) - 1}",
            got=f"{int(values.min())} to {int(values.max())}",
        )
    return {
        plane: Plane(((values >> (8 * index)) & 0xFF).astype(np.uint8), splits)
        for index, plane in enumerate(plane_names(name, width))
    }


def join_integers(planes: Planes, name: str, *, width: int) -> NDArray[np.int64]:
    """int64 values of all samples; CorruptShardError if the planes differ in length."""
    names = plane_names(name, width)
    values = np.zeros(len(planes[names[0]].data), dtype=np.int64)
    for index, plane in enumerate(names):
        data = planes[plane].data
        expect_length(plane, data, len(values))
        values |= data.astype(np.int64) << (8 * index)
    return values


def expect_length(name: str, data: Sequence[Any] | NDArray[Any], expected: int) -> None:
    """CorruptShardError unless the plane has the length that the other planes ask for."""
    if len(data) != expected:
        raise CorruptShardError(
            f"plane {name!r} has the wrong length", expected=expected, got=len(data)
        )


def float_planes(
    name: str, values: NDArray[np.float32], splits: NDArray[np.int64]
) -> dict[str, Plane]:
    """Four planes of float32 values, bit for bit."""
    bits = values.astype("<f4").view("<u4").astype(np.int64)
    return split_integers(name, bits, width=4, splits=splits)


def float_values(planes: Planes, name: str) -> NDArray[np.float32]:
    """float32 values of four planes, bit for bit."""
    return join_integers(planes, name, width=4).astype(np.uint32).view(np.float32)
