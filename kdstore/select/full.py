"""full: every token, for audits and small vocabularies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdstore.hashing import RowKeys
from kdstore.select.base import Entries, Selection, no_rest
from kdstore.select.distribution import Distribution


@dataclass(frozen=True)
class Full(Selection):
    """Every token with a probability above zero.

    >>> Full().spec
    'full'
    """

    kind = "full"

    def entries(self, described: Distribution, keys: RowKeys) -> Entries:
        """All finite log-probabilities; nothing is left for the rest."""
        del keys
        rows_N, ids_N = (described.shifted_CW > -torch.inf).nonzero(as_tuple=True)
        logprobs_N = described.shifted_CW[rows_N, ids_N] - described.log_norm_C[rows_N]
        return Entries(rows_N, ids_N, logprobs_N.float(), no_rest(described))

    def typical_entries(self, vocab_size: int) -> int:
        """All."""
        return vocab_size
