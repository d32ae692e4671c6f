"""A hinge on the order of a position's entries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdstore.train.losses.base import function_of
from kdstore.train.losses.pairs import PairLoss


@dataclass(frozen=True, kw_only=True)
class Hinge(PairLoss):
    """Mean of max(0, margin - (z_i - z_j)) over the pairs with t_i > t_j.

    z are the student's logits (ranking SVM, Joachims 2002). Neither temperature nor rest play a
    part, and ties of the teacher are no pairs.

    >>> import torch
    >>> from kdstore.testing.batch import one_position
    >>> batch = one_position([0.75, 0.25])
    >>> hinge(torch.tensor([[0.0, 2.0]]), batch).item()
    3.0
    """

    name = "hinge"
    margin: float = 1.0

    def of_margin(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """max(0, margin - d), and -1 where it is above zero."""
        short = self.margin - difference
        return short.clamp(min=0), -(short > 0).to(short.dtype)


hinge = function_of(Hinge)
