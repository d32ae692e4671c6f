"""KL(teacher || teacher and student mixed)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdstore.train.losses.base import function_of
from kdstore.train.losses.divergence import NonlinearDivergence, log_mix, require_share


@dataclass(frozen=True, kw_only=True)
class SkewKL(NonlinearDivergence):
    """KL(t || α t + (1 - α) s), in nats (DistiLLM, arXiv:2402.03898, section 3.1).

    α = 0 is `forward_kl`; any larger α bounds the loss and its gradient.

    >>> import torch
    >>> from kdstore.testing.batch import one_position
    >>> batch = one_position([0.75, 0.25])
    >>> round(skew_kl(torch.tensor([[0.25, 0.75]]).log(), batch, alpha=0.5).item(), 4)
    0.1308
    """

    name = "skew_kl"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self.alpha, where="skew_kl.alpha")

    def pointwise(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """t (log t - log m), m = α t + (1 - α) s."""
        return log_t.exp() * (log_t - log_mix(log_t, log_s, share=self.alpha))


skew_kl = function_of(SkewKL)
