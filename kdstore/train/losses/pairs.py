"""Losses on pairs of a position's entries, without a K x K table of the batch.

Of every two entries of a position that the teacher tells apart, the student's logit of the likelier
one should be larger. Each entry in turn is held against the others of its position, some entries
at a time, so that a bounded table lives at once whatever K is; value and gradient are summed as
they come.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdstore.train.losses.base import Loss, segment_sum
from kdstore.train.losses.student import BLOCK_ELEMENTS, Reading, Student
from kdstore.train.losses.teacher import refuse_sampled

if TYPE_CHECKING:
    from kdstore.signal import TorchSignal


@dataclass(frozen=True, kw_only=True)
class PairLoss(Loss):
    """The mean over a position's ordered pairs; 0 where there is none."""

    def reading(self, signal: TorchSignal) -> Reading:
        """The entries' logits; UsageError for drawn signals, of which the order says little."""
        refuse_sampled(signal, loss=self.name, allowed=False)
        return Reading()

    def terms(self, student: Student, signal: TorchSignal) -> Tensor:
        """[S]: mean of ``of_margin`` over pairs of the difference of their logits."""
        return _Pairs.apply(student.logits_N, signal, self)  # type: ignore[no-untyped-call,no-any-return]

    @abstractmethod
    def of_margin(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Value and derivative at logit of the likelier entry minus logit of the other."""


class _Pairs(torch.autograd.Function):
    """(logits_N, signal, loss) -> terms_S; each term has the logits of its own entries only."""

    @staticmethod
    def forward(ctx: Any, logits_N: Tensor, signal: TorchSignal, loss: PairLoss) -> Tensor:
        rows_N, rows = signal.rows_N, len(signal)
        values_N, pairs_N = torch.zeros_like(logits_N), torch.zeros_like(logits_N)
        grad_N = torch.zeros_like(logits_N)
        widest = int(signal.indptr.diff().max()) if rows else 0
        step = max(1, BLOCK_ELEMENTS // max(widest, 1))
        for start in range(0, len(logits_N), step):
            part = slice(start, start + step)
            other_AK, beaten_AK = _others(signal, part, widest)
            value_AK, slope_AK = loss.of_margin(logits_N[part, None] - logits_N[other_AK])
            slope_AK = slope_AK.where(beaten_AK, 0.0)  # logits of -inf have no difference
            values_N[part] = value_AK.where(beaten_AK, 0.0).sum(1)
            pairs_N[part] = beaten_AK.sum(1).to(logits_N.dtype)
            grad_N[part] += slope_AK.sum(1)
            grad_N.index_add_(0, other_AK.flatten(), -slope_AK.flatten())
        pairs_S = segment_sum(pairs_N, rows_N, rows=rows).clamp(min=1)
        ctx.save_for_backward(grad_N / pairs_S[rows_N], rows_N)
        return segment_sum(values_N, rows_N, rows=rows) / pairs_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor, None, None]:
        grad_N, rows_N = ctx.saved_tensors
        return grad_S[rows_N] * grad_N, None, None


def _others(signal: TorchSignal, part: slice, widest: int) -> tuple[Tensor, Tensor]:
    """int64 and bool [A, K]: the entries of each entry's position, and which are less likely."""
    rows_A = signal.rows_N[part]
    first_A, end_A = signal.indptr[rows_A], signal.indptr[rows_A + 1]
    other_AK = first_A[:, None] + torch.arange(widest, device=rows_A.device)
    inside_AK = other_AK < end_A[:, None]
    other_AK = torch.where(inside_AK, other_AK, first_A[:, None])
    less_AK = signal.logprobs_N[other_AK] < signal.logprobs_N[part, None]
    return other_AK, less_AK & inside_AK
