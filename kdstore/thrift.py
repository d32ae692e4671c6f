"""Structs in Thrift's compact protocol, which footers and page headers of Parquet are.

What is read is strict: no field twice, nothing that is longer than the bytes, no map.
"""

from __future__ import annotations

from typing import Any

_MAX_DEPTH = 8

Fields = dict[int, Any]
Buffer = bytes | memoryview


def read_struct(data: Buffer, at: int = 0, depth: int = 1) -> tuple[Fields, int]:
    """The fields of a struct by id, and where it ends.

    32-bit integers are ints, others pairs of their kind and value. Raises ValueError, and
    IndexError where the bytes end too early.
    """
    fields: Fields = {}
    last = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            last += head >> 4
        else:
            last, at = _zigzag(data, at)
        if last in fields or depth > _MAX_DEPTH:
            raise ValueError("a struct has a field twice, or is too deep")
        kind = head & 15
        if kind < 3:  # a bool is in the kind of its field
            fields[last] = kind == 1
        else:
            fields[last], at = _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: Buffer, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind == 5:
        value, at = _zigzag(data, at)
        if not -(1 << 31) <= value < 1 << 31:
            raise ValueError("a number of more than 32 bits")
        return value, at
    if kind in (4, 6):
        value, at = _zigzag(data, at)
        return (kind, value), at
    if kind == 8:
        length, at = _varint(data, at)
        return data[at : at + length], at + length
    if kind == 9:
        return _list(data, at, depth)
    if kind == 12:
        return read_struct(data, at, depth + 1)
    width = {1: 1, 2: 1, 3: 1, 7: 8}.get(kind)
    if width is None:
        raise ValueError(f"a field of kind {kind}")
    return data[at : at + width], at + width


def _list(data: Buffer, at: int, depth: int) -> tuple[list[Any], int]:
    head = data[at]
    size, at = (head >> 4, at + 1) if head >> 4 < 15 else _varint(data, at + 1)
    if size > len(data) - at:
        raise ValueError(f"a list of {size} in {len(data) - at} bytes")
    values = []
    for _ in range(size):
        value, at = _value(data, at, head & 15, depth)
        values.append(value)
    return values, at


def _zigzag(data: Buffer, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number that does not end")
