"""KL(teacher || student) on sparse targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdstore.train.losses.base import (
    Reduction,
    is_sampled,
    reduce_terms,
    refuse_temperature,
    refuse_without_entries,
    segment_sum,
)
from kdstore.train.losses.terms import Entries, StudentTerms, student_terms

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch
    from kdstore.signal import TorchSignal


def forward_kl(
    logits: Tensor,
    batch: Batch,
    *,
    reduction: Reduction = "mean",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """KL(t || s) in nats at temperature 1; gradient (Σt̂) s - t̂ where there is no rest.

    * ``pps``, ``counts``: -entropy - Σ t̂ log s with the stored entropy of the teacher. Unbiased,
      and so may be negative at a position. Without a stored ``entropy`` it is the cross-entropy
      -Σ t̂ log s, which has the same gradient (Random Sampling KD, ACL 2025, section 3).
    * ``full``, ``topk``, ``topp``: Σ t̂ (log t̂ - log s) + r (log r - log s_r), where r is the rest
      and s_r the student's mass outside the entries, from a log-sum-exp with the entries masked
      out. Zero, with a zero gradient, where the student is the teacher.

    Raises SignalError if a stored id is no column of the logits.

    >>> import numpy as np
    >>> from types import SimpleNamespace
    >>> from kdstore import SparseSignal
    >>> signal = SparseSignal.from_arrays("full", [0, 2], [0, 1], np.log([0.5, 0.5]))
    >>> batch = SimpleNamespace(signal=signal.to_torch(), logit_rows_S=torch.tensor([0]),
    ...     weights_S=torch.ones(1))
    >>> round(forward_kl(torch.tensor([[0.75, 0.25]]).log(), batch).item(), 4)
    0.1438
    """
    signal = batch.signal
    sampled = is_sampled(signal.selection)
    refuse_temperature(signal.selection)
    refuse_without_entries(signal.selection)
    with_rest = not sampled and bool((signal.rest_S > -torch.inf).any())
    entries = Entries(signal.indptr, signal.rows_N, signal.ids_N)
    student = student_terms(logits, batch.logit_rows_S, entries, with_outside=with_rest)
    terms_S = _sampled_terms(student, signal) if sampled else _exact_terms(student, signal)
    return reduce_terms(terms_S, batch, reduction=reduction, denominator=denominator)


def _sampled_terms(student: StudentTerms, signal: TorchSignal) -> Tensor:
    """[S]: -Σ t̂ log s, less the teacher's entropy where it is stored."""
    log_s_N = student.logits_N - student.lse_S[signal.rows_N]
    log_t_N = signal.logprobs_N.to(log_s_N.dtype)
    cross_S = segment_sum(_weighted(log_t_N, -log_s_N), signal.rows_N, rows=len(signal))
    entropy_S = signal.scalars.get("entropy")
    return cross_S if entropy_S is None else cross_S - entropy_S.to(cross_S.dtype)


def _exact_terms(student: StudentTerms, signal: TorchSignal) -> Tensor:
    """[S]: Σ t̂ (log t̂ - log s) over the entries and the rest."""
    log_s_N = student.logits_N - student.lse_S[signal.rows_N]
    log_t_N = signal.logprobs_N.to(log_s_N.dtype)
    terms_S = segment_sum(_weighted(log_t_N, log_t_N - log_s_N), signal.rows_N, rows=len(signal))
    if student.outside_lse_S is None:
        return terms_S
    log_rest_S = signal.rest_S.to(terms_S.dtype)
    return terms_S + _weighted(log_rest_S, log_rest_S - (student.outside_lse_S - student.lse_S))


def _weighted(log_weight: Tensor, value: Tensor) -> Tensor:
    """exp(log_weight) * value, zero (and not NaN) where the weight is zero."""
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * value, 0.0)
