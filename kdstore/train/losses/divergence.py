"""Divergences between teacher and student: sums over the entries, and what is outside them.

``outside`` says what becomes of the mass that the entries do not carry:

* ``rest``: it is one more outcome, of the teacher's stored rest and of the student's mass outside
  the entries. Zero, with a zero gradient, where the student is the teacher
* ``renormalize``: both are made to sum to one over the entries; what the student does elsewhere is
  free
* ``truncate``: it is left out. The student's gradient at the teacher is then not zero

A divergence at temperature T compares softmax(z / T) and is scaled by T², loss and gradient alike
(Hinton et al. 2015, arXiv:1503.02531, section 2).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from kdstore.errors import UsageError
from kdstore.train.losses.base import Loss, segment_logsumexp, segment_sum
from kdstore.train.losses.student import Reading, Student
from kdstore.train.losses.teacher import (
    Outside,
    refuse_sampled,
    refuse_temperature,
    teacher_at,
)

if TYPE_CHECKING:
    from kdstore.signal import TorchSignal

# A probability of zero counts as e^-100 of the teacher, of the student as e^-1e5 with no gradient:
# all divergences stay finite, and logits of ±1e4 keep their gradient.
TEACHER_FLOOR = -100.0
STUDENT_FLOOR = -1e5


@dataclass(frozen=True, kw_only=True)
class Divergence(Loss):
    """A divergence that is a sum over outcomes; ``pointwise`` is the summand."""

    temperature: float = 1.0
    outside: Outside = "rest"

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not torch.isfinite(torch.tensor(self.temperature)):
            raise UsageError(
                "a temperature is positive", where=self.name, expected="> 0", got=self.temperature
            )
        if self.outside not in get_args(Outside):
            raise UsageError(
                "unknown way to treat the mass outside the entries",
                where=f"{self.name}.outside",
                expected=" or ".join(get_args(Outside)),
                got=self.outside,
            )

    @abstractmethod
    def pointwise(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """The summand of an outcome, from finite log-probabilities of teacher and student."""

    def reading(self, signal: TorchSignal) -> Reading:
        """The mass outside is read only where it counts."""
        refuse_temperature(signal, temperature=self.temperature, outside=self.outside)
        return Reading(temperature=self.temperature, outside=self.outside == "rest")

    def terms(self, student: Student, signal: TorchSignal) -> Tensor:
        """[S]: T² times the sum over outcomes."""
        dtype, rows_N = student.logits_N.dtype, signal.rows_N
        teacher = teacher_at(
            signal, temperature=self.temperature, outside=self.outside, dtype=dtype
        )
        log_s_N = student.log_s_N
        if self.outside == "renormalize":
            kept_S = segment_logsumexp(student.logits_N, rows_N, rows=len(signal))
            log_s_N = student.logits_N - kept_S[rows_N]
        terms_S = segment_sum(self._floored(teacher.log_t_N, log_s_N), rows_N, rows=len(signal))
        if teacher.log_rest_S is not None:
            terms_S = terms_S + self._floored(teacher.log_rest_S, student.log_outside_S)
        return self.temperature**2 * terms_S

    def _floored(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        return self.pointwise(log_t.clamp(min=TEACHER_FLOOR), log_s.clamp(min=STUDENT_FLOOR))


@dataclass(frozen=True, kw_only=True)
class NonlinearDivergence(Divergence):
    """A divergence that is not linear in the teacher: drawn targets would bias it."""

    allow_sampled: bool = False

    def reading(self, signal: TorchSignal) -> Reading:
        """As any divergence, of signals that are not drawn."""
        refuse_sampled(signal, loss=self.name, allowed=self.allow_sampled)
        return super().reading(signal)


def log_mix(log_p: Tensor, log_q: Tensor, *, share: float) -> Tensor:
    """log(share p + (1 - share) q), from finite logs."""
    if share in (0, 1):
        return log_p if share else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def require_share(value: float, *, where: str) -> None:
    """UsageError unless a share of a mixture is in [0, 1]."""
    if not 0 <= value <= 1:
        raise UsageError("a share is from 0 to 1", where=where, expected="[0, 1]", got=value)
