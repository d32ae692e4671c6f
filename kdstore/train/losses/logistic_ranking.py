"""A logistic loss on the order of a position's entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdstore.train.losses.base import function_of
from kdstore.train.losses.pairs import PairLoss


@dataclass(frozen=True, kw_only=True)
class LogisticRanking(PairLoss):
    """Mean of log(1 + exp(-(z_i - z_j))) over the pairs with t_i > t_j.

    z are the student's logits (RankNet, Burges et al. 2005, section 3). Neither temperature nor
    rest play a part, and ties of the teacher are no pairs.

    >>> import torch
    >>> from kdstore.testing.batch import one_position
    >>> batch = one_position([0.75, 0.25])
    >>> round(logistic_ranking(torch.zeros(1, 2), batch).exp().item(), 4)
    2.0
    """

    name = "logistic_ranking"

    def of_margin(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """softplus(-d), and its derivative -sigmoid(-d)."""
        return torch.nn.functional.softplus(-difference), -torch.sigmoid(-difference)


logistic_ranking = function_of(LogisticRanking)
