"""Scalars of a position as byte planes.

``label_logprob`` and ``entropy`` lie on a grid of 1/64 nat and ``label_rank`` on the rank grid, all
rounded stochastically: never off by a whole step or more, and right on average. Every other scalar
is a float32, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.grid import Grid, nat_grid, rank_grid
from kdstore.codecs.planes import (
    Plane,
    Planes,
    expect_length,
    float_planes,
    float_values,
    join_integers,
    plane_names,
    split_integers,
)
from kdstore.errors import CorruptShardError, SignalError
from kdstore.hashing import Purpose, RowKeys, sample_hash

INFINITE = 65535
_GRIDS = {
    "label_logprob": (nat_grid(), -1.0),
    "entropy": (nat_grid(), 1.0),
    "label_rank": (rank_grid(), 1.0),
}


def scalar_planes(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the planes that hold these scalars."""
    return tuple(plane for name in names for plane in plane_names(name, 2 if name in _GRIDS else 4))


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
            planes |= split_integers(name, codes, width=2, splits=splits)
        else:
            planes |= float_planes(name, values, splits)
    return planes


def decode_scalars(
    planes: Planes, names: Sequence[str], num_scored: int
) -> dict[str, NDArray[np.float32]]:
    """float32 [S] for each name; CorruptShardError for a wrong length or an unknown code."""
    values: dict[str, NDArray[np.float32]] = {}
    for name in names:
        if name in _GRIDS:
            values[name] = _grid_values(name, join_integers(planes, name, width=2))
        else:
            values[name] = float_values(planes, name)
        expect_length(name, values[name], num_scored)
    return values


def _grid_codes(name: str, values: NDArray[np.float64], keys: RowKeys) -> NDArray[np.int64]:
    grid, sign = _GRIDS[name]
    magnitude = np.maximum(sign * values, 0.0)
    finite = np.isfinite(magnitude)
    clipped = np.minimum(np.where(finite, magnitude, 0.0), grid.levels[-1])
    index = np.full(len(values), sample_hash(name) >> 1, dtype=np.int64)
    uniforms = keys.uniform_at(Purpose.SCALAR_ROUNDING, np.arange(len(values)), index)
    return np.where(finite, grid.stochastic(clipped, uniforms), INFINITE)


def _grid_values(name: str, codes: NDArray[np.int64]) -> NDArray[np.float32]:
    grid, sign = _GRIDS[name]
    finite = codes != INFINITE
    _check_codes(name, codes[finite], grid)
    values = np.where(finite, grid.decode(np.where(finite, codes, 0)), np.inf)
    return np.asarray((sign * values + 0.0).astype(np.float32))


def _check_codes(name: str, codes: NDArray[np.int64], grid: Grid) -> None:
    if len(codes) and int(codes.max()) >= len(grid.levels):
        raise CorruptShardError(
            f"unknown code of scalar {name!r}",
            expected=f"codes below {len(grid.levels)}",
            got=int(codes.max()),
        )
