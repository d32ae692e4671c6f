"""KL(teacher || student)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kdstore.errors import UsageError
from kdstore.train.losses.base import function_of, is_sampled, segment_sum
from kdstore.train.losses.divergence import STUDENT_FLOOR, Divergence
from kdstore.train.losses.student import Reading, Student

if TYPE_CHECKING:
    from kdstore.signal import TorchSignal


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Divergence):
    """KL(t || s) = Σ t (log t - log s), in nats (Hinton et al. 2015, arXiv:1503.02531).

    On ``pps`` and ``counts`` it is -H - Σ t̂ log s with the stored entropy H of the teacher:
    unbiased, and so it may be negative at a position. Without a stored ``entropy`` it is the
    cross-entropy -Σ t̂ log s, of the same gradient (Σ t̂) s - t̂ (Random Sampling KD, ACL 2025,
    section 3).

    >>> import torch
    >>> from kdstore.testing.batch import one_position
    >>> batch = one_position([0.5, 0.5])
    >>> round(forward_kl(torch.tensor([[0.75, 0.25]]).log(), batch).item(), 4)
    0.1438
    """

    name = "forward_kl"

    def pointwise(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """t (log t - log s)."""
        return log_t.exp() * (log_t - log_s)

    def reading(self, signal: TorchSignal) -> Reading:
        """Nothing outside the entries of a drawn signal, which sum to one."""
        reading = super().reading(signal)
        if not is_sampled(signal.selection):
            return reading
        if self.outside != "rest":
            raise UsageError(
                "a drawn signal sums to one and has nothing outside its entries",
                where=f"signal {signal.selection}",
                expected="outside='rest'",
                got=f"outside={self.outside!r}",
            )
        return Reading(temperature=self.temperature)

    def terms(self, student: Student, signal: TorchSignal) -> Tensor:
        """[S]: by the stored entropy where entries are drawn."""
        if not is_sampled(signal.selection):
            return super().terms(student, signal)
        log_s_N = student.log_s_N.clamp(min=STUDENT_FLOOR)
        cross_N = -signal.logprobs_N.to(log_s_N.dtype).exp() * log_s_N
        terms_S = segment_sum(cross_N, signal.rows_N, rows=len(signal))
        entropy_S = signal.scalars.get("entropy")
        if entropy_S is not None:
            terms_S = terms_S - entropy_S.to(terms_S.dtype)
        return self.temperature**2 * terms_S


forward_kl = function_of(ForwardKL)
