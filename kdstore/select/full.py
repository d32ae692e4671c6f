"""full: every token, for audits and small vocabularies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdstore.hashing import RowKeys
from kdstore.select.base import Entries, Selection, entries_of_mask, no_rest


@dataclass(frozen=True)
class Full(Selection):
    """Every token with a probability above zero.

    >>> Full().spec
    'full'
    """

    kind = "full"

    def entries(self, logp_CV: Tensor, keys: RowKeys) -> Entries:
        """All finite log-probabilities; nothing is left for the rest."""
        del keys
        return Entries(*entries_of_mask(logp_CV > -torch.inf, logp_CV), no_rest(logp_CV))

    def typical_entries(self, vocab_size: int) -> int:
        """All."""
        return vocab_size
