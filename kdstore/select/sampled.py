"""What the sampled selections share: a temperature, and exact sums to draw tokens from.

Probabilities are rounded to multiples of 2^-52. Their sums, below 2, are then exact in float64: no
order of adding, batch or device changes them, and a token's step in the cumulative sum is its
probability however much precedes it. Rounding moves a probability below 2^-29 by at most 2^-53 and
a larger one by a unit in its last place; what is below 2^-53 is never drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kdstore.select.base import Selection, require
from kdstore.select.distribution import BLOCK, Distribution

UNIT = 2.0**-52
WHOLE_UNITS = 2.0**-29  # from here up float32 numbers are multiples of 2^-52
CPU_PIECE_ELEMENTS = 1 << 16  # 512 KB in float64: in the cache of one core


@dataclass(frozen=True)
class SampledSelection(Selection):
    """A selection whose entries are an unbiased random image of softmax(z / temperature)."""

    sampled = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(0.01 <= self.temperature <= 100, self, expected="temperature from 0.01 to 100")

    def describes(self, teacher: Distribution) -> Distribution:
        """The distribution at the temperature the draws are made at."""
        return teacher if self.temperature == 1 else teacher.tempered(self.temperature)


def fixed_point(described: Distribution) -> tuple[Tensor, Tensor]:
    """float32 [C, W] probabilities in multiples of 2^-52, float64 [C, B] their sums over blocks.

    The probabilities are in spare memory.
    """
    spare = described.scratch.spare_CW
    p = torch.add(described.p_CW, WHOLE_UNITS, out=spare).sub_(WHOLE_UNITS)
    blocks = p.view(len(p), -1, BLOCK)
    # On a CPU torch casts all that it is given before it sums, on a GPU one by one.
    rows = max(1, CPU_PIECE_ELEMENTS // p.shape[1]) if p.device.type == "cpu" else len(p)
    return p, torch.cat([part.sum(-1, dtype=torch.float64) for part in torch.split(blocks, rows)])


def tokens_at(points_CK: Tensor, p_CW: Tensor, block_mass_CB: Tensor) -> Tensor:
    """int64 [C, K]: the token whose step of the cumulative sum covers each point.

    Never a token of probability zero: its step is empty. A point that rounding pushed to the total
    falls on the last token with a step. Where the total is zero the answer means nothing.
    """
    rows = torch.arange(len(p_CW), device=p_CW.device)[:, None]
    cumulative = block_mass_CB.cumsum(-1)
    points = torch.minimum(points_CK, cumulative[:, -1:] - UNIT)
    if points.shape[1] * BLOCK >= p_CW.shape[1]:
        return torch.searchsorted(p_CW.cumsum(-1, dtype=torch.float64), points, right=True)
    block = torch.searchsorted(cumulative, points, right=True)
    within = points - pad(cumulative, (1, 0)).gather(1, block)
    steps = p_CW.view(len(p_CW), -1, BLOCK)[rows, block].cumsum(-1, dtype=torch.float64)
    return block * BLOCK + torch.searchsorted(steps, within[:, :, None], right=True)[:, :, 0]
