"""What the sampled selections share: a temperature, float64 probabilities, inverse-CDF draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdstore.select.base import Selection, require


@dataclass(frozen=True)
class SampledSelection(Selection):
    """A selection whose entries are an unbiased random image of softmax(z / temperature)."""

    sampled = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(0.01 <= self.temperature <= 100, self, expected="temperature from 0.01 to 100")

    def tempered(self, logp_CV: Tensor) -> Tensor:
        """float32 [C, V] log-probabilities at the temperature the draws are made at."""
        return logp_CV if self.temperature == 1 else (logp_CV / self.temperature).log_softmax(-1)

    def probabilities(self, logp_CV: Tensor) -> Tensor:
        """float64 [C, V] probabilities of the tempered distribution, summing to one."""
        p = self.tempered(logp_CV).exp().double()
        return p / p.cumsum(-1)[:, -1:]


def inverse_cdf(cumulative_CV: Tensor, points_CK: Tensor) -> Tensor:
    """int64 [C, K]: the token whose step of the cumulative sum covers each point.

    Never a token of probability zero: its step is empty. A point that rounding pushed to the total
    or beyond falls on the last token with a step.
    """
    ids = torch.searchsorted(cumulative_CV, points_CK, right=True)
    last = torch.searchsorted(cumulative_CV, cumulative_CV[:, -1:].contiguous())
    return torch.minimum(ids, last)
