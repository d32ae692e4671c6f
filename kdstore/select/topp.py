"""topp: the fewest tokens that reach a mass, and the log mass of the rest."""

from __future__ import annotations

from dataclasses import dataclass

from kdstore.hashing import RowKeys
from kdstore.select.base import Entries, Selection, compact, require
from kdstore.select.distribution import Distribution


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

    def entries(self, described: Distribution, keys: RowKeys) -> Entries:
        """Entries and rest; a token is kept while the mass before it is below ``p``."""
        del keys
        ids = described.largest_ids(self.max_k)
        logprobs = described.logprobs_at(ids)
        p = logprobs.double().exp()
        kept = (p.cumsum(-1) - p < self.p) & (p > 0)
        rows_N, ids_N, logprobs_N = compact(ids, kept, logprobs)
        rest = described.log_mass_without(ids.where(kept, ids[:, :1]))
        return Entries(rows_N, ids_N, logprobs_N, rest)

    def typical_entries(self, vocab_size: int) -> int:
        """At most max_k."""
        return min(self.max_k, vocab_size)

    @classmethod
    def _required(cls) -> frozenset[str]:
        return frozenset({"p", "max_k"})
