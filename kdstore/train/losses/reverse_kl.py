"""KL(student || teacher)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdstore.train.losses.base import function_of
from kdstore.train.losses.divergence import NonlinearDivergence


@dataclass(frozen=True, kw_only=True)
class ReverseKL(NonlinearDivergence):
    """KL(s || t) = Σ s (log s - log t), in nats (MiniLLM, arXiv:2306.08543).

    Where the teacher's probability is zero it counts as e^-100.

    >>> import torch
    >>> from kdstore.testing.batch import one_position
    >>> batch = one_position([0.75, 0.25])
    >>> round(reverse_kl(torch.zeros(1, 2), batch).item(), 4)
    0.1438
    """

    name = "reverse_kl"

    def pointwise(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """s (log s - log t)."""
        return log_s.exp() * (log_s - log_t)


reverse_kl = function_of(ReverseKL)
