"""Cross-entropy with the labels, at the positions that carry a signal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kdstore.train.losses.base import Loss, function_of
from kdstore.train.losses.student import Reading, Student

if TYPE_CHECKING:
    from kdstore.signal import TorchSignal


@dataclass(frozen=True, kw_only=True)
class CE(Loss):
    """-log s(label) in nats, over the same positions and denominator as the other losses.

    >>> import torch
    >>> from kdstore.testing.batch import one_position
    >>> batch = one_position([1.0], label=2)
    >>> round(ce(torch.zeros(1, 2, 4), batch).exp().item(), 4)
    4.0
    """

    name = "ce"
    uses_entries = False

    def reading(self, signal: TorchSignal) -> Reading:
        """The labels; any signal will do."""
        return Reading(labels=True)

    def terms(self, student: Student, signal: TorchSignal) -> Tensor:
        """[S]: -log s(label)."""
        return -student.log_label_S


ce = function_of(CE)
