"""counts: multinomial rounds with exact integer counts (Random Sampling KD, ACL 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdstore.hashing import Purpose, RowKeys
from kdstore.select.base import MAX_ID, Entries, no_rest, require
from kdstore.select.distribution import Distribution
from kdstore.select.sampled import SampledSelection, fixed_point, tokens_at


@dataclass(frozen=True)
class Counts(SampledSelection):
    """``n`` draws with replacement; an entry's probability is its count over ``n``.

    >>> Counts(n=50).spec
    'counts:n=50'
    """

    kind = "counts"
    n: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.n <= 65535, self, expected="1 <= n <= 65535")

    def entries(self, described: Distribution, keys: RowKeys) -> Entries:
        """Entries whose ``counts_N`` sum to n at each position."""
        p, block_mass = fixed_point(described)
        u = torch.from_numpy(keys.uniform(Purpose.MULTINOMIAL, count=self.n)).to(p.device)
        ids = tokens_at(u * block_mass.sum(-1, keepdim=True), p, block_mass).sort(-1).values
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        pairs, counts = torch.unique_consecutive(rows * MAX_ID + ids, return_counts=True)
        logprobs = (counts.double() / self.n).log().float()
        return Entries(
            pairs // MAX_ID, pairs % MAX_ID, logprobs, no_rest(described), counts_N=counts
        )

    def typical_entries(self, vocab_size: int) -> int:
        """At most n."""
        return min(self.n, vocab_size)

    @classmethod
    def _required(cls) -> frozenset[str]:
        return frozenset({"n"})
