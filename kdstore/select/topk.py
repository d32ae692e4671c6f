"""topk: the k most probable tokens, and the log mass of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdstore.hashing import RowKeys
from kdstore.select.base import Entries, Selection, compact, require
from kdstore.select.distribution import Distribution


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

    def entries(self, described: Distribution, keys: RowKeys) -> Entries:
        """Entries [C·k] and rest; of equals at the k-th place the lowest ids."""
        del keys
        ids = described.largest_ids(self.k)
        logprobs = described.logprobs_at(ids)
        rows_N, ids_N, logprobs_N = compact(ids, logprobs > -torch.inf, logprobs)
        return Entries(rows_N, ids_N, logprobs_N, described.log_mass_without(ids))

    def typical_entries(self, vocab_size: int) -> int:
        """k."""
        return min(self.k, vocab_size)

    @classmethod
    def _required(cls) -> frozenset[str]:
        return frozenset({"k"})
