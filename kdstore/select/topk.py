"""topk: the k most probable tokens, and the log mass of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdstore.hashing import RowKeys
from kdstore.select.base import Entries, Selection, entries_of_mask, require, rest_of_mask


@dataclass(frozen=True)
class TopK(Selection):
    """The ``k`` largest. Fewer where fewer tokens have a probability above zero.

    >>> TopK(k=2).spec
    'topk:k=2'
    """

    kind = "topk"
    k: int = 50

    def __post_init__(self) -> None:
        require(self.k >= 1, self, expected="k >= 1")

    def entries(self, logp_CV: Tensor, keys: RowKeys) -> Entries:
        """Entries [C·k] and rest; ties at the k-th place go as torch.topk decides."""
        del keys
        top_logp, top_ids = logp_CV.topk(min(self.k, logp_CV.shape[1]), dim=-1)
        kept = torch.zeros_like(logp_CV, dtype=torch.bool)
        kept.scatter_(1, top_ids, top_logp > -torch.inf)
        return Entries(*entries_of_mask(kept, logp_CV), rest_of_mask(kept, logp_CV))

    def typical_entries(self, vocab_size: int) -> int:
        """k."""
        return min(self.k, vocab_size)

    @classmethod
    def _required(cls) -> frozenset[str]:
        return frozenset({"k"})
