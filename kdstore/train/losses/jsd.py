"""The generalised Jensen-Shannon divergence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdstore.train.losses.base import function_of
from kdstore.train.losses.divergence import NonlinearDivergence, log_mix, require_share


@dataclass(frozen=True, kw_only=True)
class JSD(NonlinearDivergence):
    """β KL(t || m) + (1 - β) KL(s || m), m = β t + (1 - β) s, in nats (GKD, arXiv:2306.13649).

    β = 0 is KL(t || s) and β = 1 is KL(s || t): what the formula tends to, over β and over 1 - β.

    >>> import torch
    >>> from kdstore.testing.batch import one_position
    >>> batch = one_position([0.75, 0.25])
    >>> round(jsd(torch.tensor([[0.25, 0.75]]).log(), batch).item(), 4)
    0.1308
    """

    name = "jsd"
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self.beta, where="jsd.beta")

    def pointwise(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """β t (log t - log m) + (1 - β) s (log s - log m)."""
        if self.beta == 0:
            return log_t.exp() * (log_t - log_s)
        if self.beta == 1:
            return log_s.exp() * (log_s - log_t)
        log_m = log_mix(log_t, log_s, share=self.beta)
        of_teacher = self.beta * log_t.exp() * (log_t - log_m)
        return of_teacher + (1 - self.beta) * log_s.exp() * (log_s - log_m)


jsd = function_of(JSD)
