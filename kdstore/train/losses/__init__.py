"""Losses on sparse teacher signals, by name in `LOSSES`.

Every loss takes `(logits, batch, *, reduction="mean", denominator=None)`: the student's logits
`[B, L, V]` or `[T, V]` and the Batch they were computed from. A new loss is one new file here and
one line in `LOSSES`.
"""

from __future__ import annotations

from kdstore.train.losses.base import Loss, Reduction
from kdstore.train.losses.ce import ce
from kdstore.train.losses.forward_kl import forward_kl

LOSSES: dict[str, Loss] = {"forward_kl": forward_kl, "ce": ce}

__all__ = ["LOSSES", "Loss", "Reduction", "ce", "forward_kl"]
