"""A logistic loss on the order of a position's entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdstore.train.losses.base import Reduction
from kdstore.train.losses.pairs import PairLoss

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch


@dataclass(frozen=True, kw_only=True)
class LogisticRanking(PairLoss):
    """Mean of log(1 + exp(-(z_i - z_j))) over the pairs with t_i > t_j.

    z are the student's logits (RankNet, Burges et al. 2005, section 3). Neither temperature nor
    rest play a part, and ties of the teacher are no pairs.
    """

    name = "logistic_ranking"

    def of_margin(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """softplus(-d), and its derivative -sigmoid(-d)."""
        return torch.nn.functional.softplus(-difference), -torch.sigmoid(-difference)


def logistic_ranking(
    logits: Tensor,
    batch: Batch,
    *,
    reduction: Reduction = "mean",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Mean logistic loss of the ordered pairs of entries; on ``topk``, ``topp`` and ``full``.

    Raises UsageError for a drawn signal, SignalError if a stored id is no column of the logits.

    >>> import numpy as np, torch
    >>> from types import SimpleNamespace
    >>> from kdstore import SparseSignal
    >>> signal = SparseSignal.from_arrays("full", [0, 2], [0, 1], np.log([0.75, 0.25]))
    >>> batch = SimpleNamespace(signal=signal.to_torch(), logit_rows_S=torch.tensor([0]),
    ...     weights_S=torch.ones(1))
    >>> round(logistic_ranking(torch.zeros(1, 2), batch).exp().item(), 4)
    2.0
    """
    return LogisticRanking()(logits, batch, reduction=reduction, denominator=denominator)
