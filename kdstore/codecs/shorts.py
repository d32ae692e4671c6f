"""Shorts: non-negative integers as one code byte each and, for the larger ones, extra bytes.

=========  =====  =================================================
code       extra  value
=========  =====  =================================================
0 … 191    0      code
192 … 247  1      192 + (code - 192) * 256 + extra
248 … 253  2      14,528 + (code - 248) * 65,536 + extra
254        3      407,744 + extra
255        0      none: what is not finite
=========  =====  =================================================

Extra bytes are little-endian, in a plane of their own. The codes of small numbers are skewed and
the extra bytes of large ones are nearly uniform, so an entropy coder spends what the number is
worth; low bytes and high bytes in two planes lose what each says of the other (6 % of the ids).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.jit import i64, kernel, u
from kdstore.codecs.planes import Plane, Planes
from kdstore.errors import CorruptShardError, SignalError

ONE, TWO, THREE, NONE = 192, 248, 254, 255
TWO_START = ONE + (TWO - ONE) * 256
THREE_START = TWO_START + (THREE - TWO) * 65536
LIMIT = THREE_START + (1 << 24)
MISSING = (1 << 32) - 1  # what the code for none decodes to


def short_names(*names: str) -> tuple[str, ...]:
    """Names of the planes of streams of shorts: the codes', then the extra bytes'."""
    return tuple(plane for name in names for plane in (name, f"{name}/extra"))


def encode_shorts(name: str, values: NDArray[Any], splits: NDArray[np.int64]) -> dict[str, Plane]:
    """Planes of integers [N] (``MISSING`` for none); sample b owns ``splits[b]:splits[b + 1]``.

    Raises SignalError if a value is negative or too large: a bit is never masked away.
    """
    numbers = np.asarray(values)
    codes = np.empty(len(numbers), dtype=np.uint8)
    extra = np.empty(3 * len(numbers), dtype=np.uint8)
    ends = np.zeros(len(splits), dtype=np.int64)
    bad = _pack(numbers, splits, codes, extra, ends)
    if bad >= 0:
        raise SignalError(
            f"a value of {name!r} does not fit its planes",
            expected=f"0 to {LIMIT - 1}",
            got=int(numbers[bad]),
        )
    return {name: Plane(codes, splits), f"{name}/extra": Plane(extra[: ends[-1]].copy(), ends)}


def decode_shorts(
    planes: Planes, name: str, *, length: int | None = None, none: bool = False
) -> NDArray[np.uint32]:
    """uint32 [N] values of all samples; ``MISSING`` for none, where ``none`` allows it.

    Raises CorruptShardError if the planes disagree with each other or with ``length``.
    """
    codes, extra = planes[name].data, planes[f"{name}/extra"].data
    if length is not None and len(codes) != length:
        raise CorruptShardError(
            f"plane {name!r} has the wrong length", expected=length, got=len(codes)
        )
    values = np.empty(len(codes), dtype=np.uint32)
    used = _expand(codes, extra, values, none)
    if used != len(extra):
        raise CorruptShardError(
            f"plane {name!r} and its extra bytes disagree",
            expected="as many extra bytes as the codes ask for",
            got=f"{len(extra)} extra bytes",
        )
    return values


def read_stream(planes: Planes, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Codes and extra bytes of a stream, as kernels read them."""
    return planes[name].data, planes[f"{name}/extra"].data


@kernel
def _pack(
    values: NDArray[Any],
    splits: NDArray[Any],
    codes: NDArray[Any],
    extra: NDArray[Any],
    ends: NDArray[Any],
) -> int:
    """The first value that does not fit, or -1; fills how many extra bytes come before a split."""
    at = 0
    for b in range(len(splits) - 1):
        for i in range(splits[b], splits[b + 1]):
            value = i64(values[u(i)])
            if value < 0 or (value >= LIMIT and value != MISSING):
                return i
            if value < ONE:
                codes[u(i)] = value
                continue
            if value == MISSING:
                codes[u(i)] = NONE
                continue
            if value < TWO_START:
                code, start, size, length = ONE, ONE, 8, 1
            elif value < THREE_START:
                code, start, size, length = TWO, TWO_START, 16, 2
            else:
                code, start, size, length = THREE, THREE_START, 24, 3
            rest = value - start
            codes[u(i)] = code + (rest >> size)
            for _ in range(length):
                extra[u(at)] = rest & 255
                rest >>= 8
                at += 1
        ends[b + 1] = at
    return -1


@kernel
def read_long(code: int, extra: NDArray[Any], at: int) -> tuple[int, int]:
    """Value of a code of 192 or more and where the next extra byte is.

    -1 if the bytes run out, -2 for the code for none.
    """
    if code < TWO:
        if at + 1 > len(extra):
            return -1, at
        return ONE + ((code - ONE) << 8) + i64(extra[u(at)]), at + 1
    if code == NONE:
        return -2, at
    if at + (2 if code < THREE else 3) > len(extra):
        return -1, at
    low = i64(extra[u(at)]) | i64(extra[u(at + 1)]) << 8
    if code < THREE:
        return TWO_START + ((code - TWO) << 16) + low, at + 2
    return THREE_START + (low | i64(extra[u(at + 2)]) << 16), at + 3


@kernel
def _expand(codes: NDArray[Any], extra: NDArray[Any], values: NDArray[Any], none: bool) -> int:
    """Extra bytes used, or -1 if they run out or a code is none where it must not be."""
    at = 0
    for i in range(len(codes)):
        value = i64(codes[u(i)])
        if value >= ONE:
            value, at = read_long(value, extra, at)
            if value == -1 or (value == -2 and not none):
                return -1
            if value == -2:
                value = MISSING
        values[u(i)] = value
    return at
