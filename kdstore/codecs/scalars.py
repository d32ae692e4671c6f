"""Scalars of a position as planes.

``label_logprob`` and ``entropy`` lie on a grid of 1/64 nat and ``label_rank`` on the rank grid, all
rounded stochastically: never off by a whole step or more, and right on average. They are stored as
shorts. Every other scalar is a float32, bit for bit, in four planes of one byte each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.grid import nat_grid, rank_grid
from kdstore.codecs.planes import Plane, Planes, byte_names, decode_bytes, encode_bytes
from kdstore.codecs.shorts import MISSING, decode_shorts, encode_shorts, short_names
from kdstore.errors import CorruptShardError, SignalError
from kdstore.hashing import Purpose, RowKeys, sample_hash

_GRIDS = {
    "label_logprob": (nat_grid(), -1.0),
    "entropy": (nat_grid(), 1.0),
    "label_rank": (rank_grid(), 1.0),
}


def scalar_planes(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the planes that hold these scalars."""
    return tuple(
        plane
        for name in names
        for plane in (short_names(name) if name in _GRIDS else byte_names(name, 4))
    )


def encode_scalars(
    scalars: Mapping[str, NDArray[np.float32]], keys: RowKeys, splits: NDArray[np.int64]
) -> dict[str, Plane]:
    """Planes of scalars [S]; SignalError on NaN."""
    planes: dict[str, Plane] = {}
    for name, values in scalars.items():
        if np.isnan(values).any():
            raise SignalError(f"scalar {name!r} is not a number", got="NaN")
        if name in _GRIDS:
            codes = _grid_codes(name, values.astype(np.float64), keys)
            planes |= encode_shorts(name, codes, splits)
        else:
            planes |= encode_bytes(name, values.astype("<f4"), splits)
    return planes


def decode_scalars(
    planes: Planes, names: Sequence[str], num_scored: int
) -> dict[str, NDArray[np.float32]]:
    """float32 [S] for each name; CorruptShardError for a wrong length or an unknown code."""
    values: dict[str, NDArray[np.float32]] = {}
    for name in names:
        if name in _GRIDS:
            codes = decode_shorts(planes, name, length=num_scored, none=True)
            values[name] = _grid_values(name, codes)
        else:
            values[name] = _float_values(planes, name, num_scored)
    return values


def _float_values(planes: Planes, name: str, num_scored: int) -> NDArray[np.float32]:
    values = decode_bytes(planes, name, dtype="<f4", length=num_scored).astype(np.float32)
    if np.isnan(values).any():
        raise CorruptShardError(f"scalar {name!r} is not a number", got="NaN")
    return values


def _grid_codes(name: str, values: NDArray[np.float64], keys: RowKeys) -> NDArray[np.int64]:
    grid, sign = _GRIDS[name]
    magnitude = np.maximum(sign * values, 0.0)
    finite = np.isfinite(magnitude)
    clipped = np.minimum(np.where(finite, magnitude, 0.0), grid.levels[-1])
    index = np.full(len(values), sample_hash(name) >> 1, dtype=np.int64)
    uniforms = keys.uniform_at(Purpose.SCALAR_ROUNDING, np.arange(len(values)), index)
    return np.where(finite, grid.stochastic(clipped, uniforms), MISSING)


def _grid_values(name: str, codes: NDArray[np.uint32]) -> NDArray[np.float32]:
    table = _table(name)
    known = len(table) - 1
    unknown = (codes >= known) & (codes != MISSING)
    if unknown.any():
        raise CorruptShardError(
            f"unknown code of scalar {name!r}",
            expected=f"codes below {known}",
            got=int(codes[unknown][0]),
        )
    return np.asarray(table[np.minimum(codes, known)])


@cache
def _table(name: str) -> NDArray[np.float32]:
    """The value of each code, and last of none."""
    grid, sign = _GRIDS[name]
    return np.append(sign * grid.levels + 0.0, sign * np.inf).astype(np.float32)
