"""The total variation distance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdstore.train.losses.base import function_of
from kdstore.train.losses.divergence import NonlinearDivergence


@dataclass(frozen=True, kw_only=True)
class TVD(NonlinearDivergence):
    """½ Σ |t - s|, from 0 to 1 (f-distill, arXiv:2307.15190).

    >>> import torch
    >>> from kdstore.testing.batch import one_position
    >>> batch = one_position([0.75, 0.25])
    >>> round(tvd(torch.zeros(1, 2), batch).item(), 4)
    0.25
    """

    name = "tvd"

    def pointwise(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """½ |t - s|."""
        return 0.5 * (log_t.exp() - log_s.exp()).abs()


tvd = function_of(TVD)
