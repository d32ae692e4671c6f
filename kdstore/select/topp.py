"""topp: the fewest tokens that reach a mass, and the log mass of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdstore.hashing import RowKeys
from kdstore.select.base import Entries, Selection, entries_of_mask, require, rest_of_mask


@dataclass(frozen=True)
class TopP(Selection):
    """The smallest set whose mass reaches ``p``: at least one token, at most ``max_k``.

    >>> TopP(p=0.9).spec
    'topp:p=0.9,max_k=100'
    """

    kind = "topp"
    p: float = 0.95
    max_k: int = 100

    def __post_init__(self) -> None:
        require(0 < self.p <= 1 and self.max_k >= 1, self, expected="0 < p <= 1 and max_k >= 1")

    def entries(self, logp_CV: Tensor, keys: RowKeys) -> Entries:
        """Entries and rest; a token is kept while the mass before it is below ``p``."""
        del keys
        top_logp, top_ids = logp_CV.topk(min(self.max_k, logp_CV.shape[1]), dim=-1)
        top_p = top_logp.double().exp()
        wanted = (top_p.cumsum(-1) - top_p < self.p) & (top_p > 0)
        kept = torch.zeros_like(logp_CV, dtype=torch.bool).scatter_(1, top_ids, wanted)
        return Entries(*entries_of_mask(kept, logp_CV), rest_of_mask(kept, logp_CV))

    def typical_entries(self, vocab_size: int) -> int:
        """At most max_k."""
        return min(self.max_k, vocab_size)

    @classmethod
    def _required(cls) -> frozenset[str]:
        return frozenset({"p", "max_k"})
