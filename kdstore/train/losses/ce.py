"""Cross-entropy with the labels, at the positions that carry a signal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdstore.train.losses.base import Reduction, labels_S, reduce_terms
from kdstore.train.losses.terms import Entries, student_terms

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch


def ce(
    logits: Tensor,
    batch: Batch,
    *,
    reduction: Reduction = "mean",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """-log s(label) in nats, over the same positions and denominator as the other losses.

    Raises SignalError if a label is no column of the logits.

    >>> from types import SimpleNamespace
    >>> batch = SimpleNamespace(labels=torch.tensor([[-100, 2, -100]]), signal=[None],
    ...     logit_rows_S=torch.tensor([0]), weights_S=torch.ones(1))
    >>> round(ce(torch.zeros(1, 3, 4), batch).exp().item(), 4)
    4.0
    """
    terms_S = label_nll(logits, batch.logit_rows_S, labels_S(batch))
    return reduce_terms(terms_S, batch, reduction=reduction, denominator=denominator)


def label_nll(logits: Tensor, rows_S: Tensor, ids_S: Tensor) -> Tensor:
    """[S]: lse - logit of one token per row of ``logits`` [..., V]; float32 or float64."""
    bounds = torch.arange(len(ids_S) + 1, device=ids_S.device)
    terms = student_terms(logits, rows_S, Entries(bounds, bounds[:-1], ids_S))
    return terms.lse_S - terms.logits_N
