"""Value grids: ascending levels, and unbiased rounding to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SCALAR_STEP = 1 / 64
SCALAR_LEVELS = 1 << 16
RANK_EXACT = 255
RANK_GROWTH = 1.05


@dataclass(frozen=True, eq=False)
class Grid:
    """float64 levels, ascending; a code is an index into them."""

    levels: NDArray[np.float64]

    def below(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """int64 codes of the highest level not above each value, so that code + 1 exists."""
        codes = np.searchsorted(self.levels, values, side="right") - 1
        return np.clip(codes, 0, len(self.levels) - 2)

    def stochastic(
        self, values: NDArray[np.float64], uniforms: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """int64 codes whose level has the value as its expectation; levels stay as they are."""
        low = self.below(values)
        fraction = (values - self.levels[low]) / (self.levels[low + 1] - self.levels[low])
        return low + (uniforms < fraction)


def nat_grid() -> Grid:
    """Multiples of 1/64 nat from 0 to 1023.98."""
    return Grid(np.arange(SCALAR_LEVELS, dtype=np.float64) * SCALAR_STEP)


def rank_grid() -> Grid:
    """Ranks: every integer to 255, then steps of 5 %, up to beyond 2^24."""
    steps = int(np.ceil(np.log(2**25 / RANK_EXACT) / np.log(RANK_GROWTH)))
    beyond = RANK_EXACT * RANK_GROWTH ** np.arange(1, steps, dtype=np.float64)
    exact = np.arange(RANK_EXACT + 1, dtype=np.float64)
    return Grid(np.concatenate([exact, beyond]).astype(np.float64))
