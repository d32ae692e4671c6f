"""How far decoded signals are from the teacher's distribution, position by position.

``signal`` holds C decoded positions, ``teacher_CV`` float64 [C, V] the teacher's probabilities at
them, t below; what was decoded is q. Logs are natural.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.signal import SparseSignal, segment_sum

Floats = NDArray[np.float64]


def quantisation_kl(signal: SparseSignal, teacher_CV: Floats) -> Floats:
    """float64 [C]: KL(t ‖ q) in nats over the entries, and all else as one outcome.

    Of a signal without rounding it is zero, whatever its entries leave out.
    """
    others_CV = _cleared(teacher_CV, signal, np.ones(signal.num_entries, dtype=bool))
    entries_N = _kl_terms(_at_entries(signal, teacher_CV), signal.logprobs_N)
    return _sums(entries_N, signal) + _kl_terms(others_CV.sum(1), signal.rest_S)


def truncation_kl(signal: SparseSignal, teacher_CV: Floats) -> Floats:
    """float64 [C]: -log of the mass that t has on the entries, in nats.

    It is KL(t' ‖ t) of the truncated teacher t', which is t on the entries divided by that mass.
    """
    mass_C = np.minimum(_sums(_at_entries(signal, teacher_CV), signal), 1.0)
    return np.asarray(-np.log(mass_C))


def squared_error(signal: SparseSignal, teacher_CV: Floats) -> Floats:
    """float64 [C]: Σ (qᵢ - tᵢ)²; its mean over unbiased draws is Σ Var(qᵢ)."""
    return np.asarray(_squared_errors(signal, teacher_CV).sum(1))


def relative_error(signal: SparseSignal, teacher_CV: Floats) -> Floats:
    """float64 [C]: Σ (qᵢ - tᵢ)² / tᵢ over the tokens with tᵢ > 0.

    Its mean over unbiased draws is Σ Var(qᵢ) / tᵢ, but most of that comes from tokens so rare that
    few audits see one drawn: it is mostly too small, and now and then far too large.
    ``expected_relative_error`` does not have to wait for them.
    """
    return np.asarray(_divide(_squared_errors(signal, teacher_CV), teacher_CV).sum(1))


def expected_relative_error(signal: SparseSignal, teacher_CV: Floats) -> Floats:
    """float64 [C]: the mean of ``relative_error`` over which tokens are drawn.

    For n multinomial rounds over the V' tokens with tᵢ > 0 it is (V' - 1) / n. For a head as
    decoded, and n entries of the decoded weight ŵ drawn from the V'' tokens of the tail, of mass m,
    each with the probability tᵢ n / m, it is the head's error + V'' ŵ² n / m - 2 n ŵ + m.
    """
    if signal.counts_N is not None:
        return np.asarray(((teacher_CV > 0).sum(1) - 1) / _sums(signal.counts_N, signal))
    tail_N = np.zeros(signal.num_entries, dtype=bool) if signal.tail_N is None else signal.tail_N
    tail_CV = _cleared(teacher_CV, signal, ~tail_N)
    mass_C, tokens_C = tail_CV.sum(1), (tail_CV > 0).sum(1)
    drawn_C = _sums(np.where(tail_N, np.exp(signal.logprobs_N.astype(np.float64)), 0), signal)
    counts_C = np.maximum(signal.tail_counts_S, 1)  # where there is none, nothing is drawn
    tail_C = tokens_C * _divide(np.square(drawn_C) / counts_C, mass_C) - 2 * drawn_C + mass_C
    errors_CV = _divide(_squared_errors(signal, teacher_CV), teacher_CV)
    heads_C = _sums(np.where(tail_N, 0, _at_entries(signal, errors_CV)), signal)
    return np.asarray(heads_C + tail_C)


def angle_degrees(one_V: Floats, other_V: Floats) -> float:
    """The angle between two vectors, in degrees; exact also where it is small."""
    one, other = one_V / np.linalg.norm(one_V), other_V / np.linalg.norm(other_V)
    halves = np.linalg.norm(one - other), np.linalg.norm(one + other)
    return float(np.degrees(2 * np.arctan2(*halves)))


def _squared_errors(signal: SparseSignal, teacher_CV: Floats) -> Floats:
    return np.square(signal.to_dense(teacher_CV.shape[1]) - teacher_CV)


def _at_entries(signal: SparseSignal, values_CV: Floats) -> Floats:
    return np.asarray(values_CV[signal.rows_N, signal.ids_N])


def _cleared(values_CV: Floats, signal: SparseSignal, which_N: NDArray[np.bool_]) -> Floats:
    """A copy with zeros at some of the entries."""
    cleared_CV = values_CV.copy()
    cleared_CV[signal.rows_N[which_N], signal.ids_N[which_N]] = 0
    return cleared_CV


def _sums(values_N: NDArray[Any], signal: SparseSignal) -> Floats:
    return np.asarray(segment_sum(values_N, signal.indptr), dtype=np.float64)


def _divide(values: Floats, by: Floats) -> Floats:
    """The quotient, zero where the divisor is."""
    return np.divide(values, by, out=np.zeros_like(values), where=by > 0)


def _kl_terms(p: Floats, log_q: NDArray[np.float32]) -> Floats:
    """p (log p - log q), zero where p is."""
    terms = np.zeros_like(p)
    some = p > 0
    terms[some] = p[some] * (np.log(p[some]) - log_q[some])
    return terms
