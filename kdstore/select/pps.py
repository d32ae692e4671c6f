"""pps: an unbiased sparse distribution that sums to one.

The head is kept exactly; the tail is drawn by systematic sampling with probability proportional to
size (Madow, "On the theory of systematic sampling, II", 1949), each drawn token weighing the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdstore.hashing import Purpose, RowKeys
from kdstore.select.base import Entries, entries_of_mask, no_rest, require
from kdstore.select.sampled import SampledSelection, inverse_cdf

HEAD_SLACK = 1e-6


@dataclass(frozen=True)
class PPS(SampledSelection):
    """Head above the tail weight, tail of mass m as ``ceil(m / tau)`` tokens of equal weight.

    Inclusion probability of a tail token is p / w, so that E[entry] = p exactly.

    >>> PPS(tau=0.06).spec
    'pps:tau=0.06'
    """

    kind = "pps"
    tau: float = 0.06

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.tau <= 1, self, expected="0 < tau <= 1")

    def entries(self, logp_CV: Tensor, keys: RowKeys) -> Entries:
        """Entries that sum to one; ``tail_N`` marks the sampled ones, all of weight w."""
        p = self.probabilities(logp_CV)
        head, cumulative, num_tail, weight = split_head(p, tau=self.tau)
        u = torch.from_numpy(keys.uniform(Purpose.TAIL_SAMPLING)).to(p.device)
        step = torch.arange(max(int(num_tail.max()), 1), device=p.device)
        ids = inverse_cdf(cumulative, (u + step) * weight[:, None])
        drawn = step < num_tail[:, None]
        kept = head.clone()
        kept[drawn.nonzero(as_tuple=True)[0], ids[drawn]] = True
        log_p = torch.where(head, p, weight[:, None]).log()
        rows_N, ids_N, logprobs_N = entries_of_mask(kept, log_p)
        return Entries(rows_N, ids_N, logprobs_N, no_rest(logp_CV), tail_N=~head[rows_N, ids_N])

    def typical_entries(self, vocab_size: int) -> int:
        """One per tau of probability, head or tail."""
        return min(math.ceil(1 / self.tau), vocab_size)

    @classmethod
    def _required(cls) -> frozenset[str]:
        return frozenset({"tau"})


def split_head(p_CV: Tensor, *, tau: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Head mask [C, V], cumulative tail mass [C, V], tail draws n [C] and tail weight w [C].

    Starting from the tokens of at least ``tau``, tail tokens of at least w(1 - 1e-6) join the head
    until none is left. From that start w never grows, so every head value stays above w.
    """
    head = p_CV >= tau
    while True:
        cumulative = p_CV.masked_fill(head, 0).cumsum(-1)
        mass = cumulative[:, -1]
        num_tail = (mass / tau).ceil()
        weight = torch.where(num_tail > 0, mass / num_tail.clamp(min=1), 0)
        joins = (p_CV >= weight[:, None] * (1 - HEAD_SLACK)) & (p_CV > 0) & ~head
        if not bool(joins.any()):
            return head, cumulative, num_tail.long(), weight
        head |= joins
