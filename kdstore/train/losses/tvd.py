"""The total variation distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kdstore.train.losses.base import Reduction
from kdstore.train.losses.divergence import NonlinearDivergence
from kdstore.train.losses.teacher import Outside

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch


@dataclass(frozen=True, kw_only=True)
class TVD(NonlinearDivergence):
    """½ Σ |t - s|, from 0 to 1 (f-distill, arXiv:2307.15190)."""

    name = "tvd"

    def pointwise(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """½ |t - s|."""
        return 0.5 * (log_t.exp() - log_s.exp()).abs()


def tvd(
    logits: Tensor,
    batch: Batch,
    *,
    temperature: float = 1.0,
    outside: Outside = "rest",
    allow_sampled: bool = False,
    reduction: Reduction = "mean",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """½ Σ |t - s|, on ``topk``, ``topp`` and ``full`` signals.

    With ``rest`` the tokens outside the entries count as one outcome, which makes it a lower bound
    of the dense distance. Raises UsageError for a drawn signal unless ``allow_sampled``; otherwise
    as `forward_kl`.

    >>> import numpy as np, torch
    >>> from types import SimpleNamespace
    >>> from kdstore import SparseSignal
    >>> signal = SparseSignal.from_arrays("full", [0, 2], [0, 1], np.log([0.75, 0.25]))
    >>> batch = SimpleNamespace(signal=signal.to_torch(), logit_rows_S=torch.tensor([0]),
    ...     weights_S=torch.ones(1))
    >>> round(tvd(torch.zeros(1, 2), batch).item(), 4)
    0.25
    """
    loss = TVD(temperature=temperature, outside=outside, allow_sampled=allow_sampled)
    return loss(logits, batch, reduction=reduction, denominator=denominator)
