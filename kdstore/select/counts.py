"""counts: multinomial rounds with exact integer counts (Random Sampling KD, ACL 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdstore.hashing import Purpose, RowKeys
from kdstore.select.base import Entries, no_rest, require
from kdstore.select.sampled import SampledSelection, inverse_cdf


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

    def entries(self, logp_CV: Tensor, keys: RowKeys) -> Entries:
        """Entries whose ``counts_N`` sum to n at each position."""
        cumulative = self.probabilities(logp_CV).cumsum(-1)
        u = torch.from_numpy(keys.uniform(Purpose.MULTINOMIAL, count=self.n)).to(logp_CV.device)
        ids = inverse_cdf(cumulative, u * cumulative[:, -1:])
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        pairs, counts = torch.unique(rows * logp_CV.shape[1] + ids, return_counts=True)
        logprobs = (counts.double() / self.n).log().float()
        return Entries(
            pairs // logp_CV.shape[1],
            pairs % logp_CV.shape[1],
            logprobs,
            no_rest(logp_CV),
            counts_N=counts,
        )

    def typical_entries(self, vocab_size: int) -> int:
        """At most n."""
        return min(self.n, vocab_size)

    @classmethod
    def _required(cls) -> frozenset[str]:
        return frozenset({"n"})
