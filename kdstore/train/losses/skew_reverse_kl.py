"""KL(student || student and teacher mixed)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdstore.train.losses.base import function_of
from kdstore.train.losses.skew_kl import SkewKL


@dataclass(frozen=True, kw_only=True)
class SkewReverseKL(SkewKL):
    """KL(s || α s + (1 - α) t), in nats (DistiLLM, arXiv:2402.03898, section 3.1).

    α = 0 is `reverse_kl`; any larger α bounds the loss and its gradient.

    >>> import torch
    >>> from kdstore.testing.batch import one_position
    >>> batch = one_position([0.75, 0.25])
    >>> round(skew_reverse_kl(torch.tensor([[0.25, 0.75]]).log(), batch, alpha=0.5).item(), 4)
    0.1308
    """

    name = "skew_reverse_kl"

    def pointwise(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """s (log s - log m), m = α s + (1 - α) t."""
        return super().pointwise(log_s, log_t)


skew_reverse_kl = function_of(SkewReverseKL)
