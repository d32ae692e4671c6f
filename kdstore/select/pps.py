"""pps: an unbiased sparse distribution that sums to one.

The head is kept exactly; the tail is drawn by systematic sampling with probability proportional to
size (Madow, "On the theory of systematic sampling, II", 1949), each drawn token weighing the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kdstore.hashing import Purpose, RowKeys
from kdstore.select.base import Entries, compact, no_rest, require
from kdstore.select.distribution import BLOCK, Distribution
from kdstore.select.sampled import SampledSelection, fixed_point, tokens_at

HEAD_SLACK = 1e-6
MIN_TAU = 1e-4  # what the format stores: 10,000 entries a position


@dataclass(frozen=True)
class PPS(SampledSelection):
    """Head above the tail weight, tail of mass m as ``ceil(m / tau)`` tokens of equal weight.

    Inclusion probability of a tail token is p / w, so that E[entry] = p exactly.

    >>> PPS(tau=0.06).spec
    'pps:tau=0.06'
    """

    kind = "pps"
    tau: float = 0.02  # docs/quality.md

    def __post_init__(self) -> None:
        super().__post_init__()
        require(MIN_TAU <= self.tau <= 1, self, expected=f"{MIN_TAU} <= tau <= 1")

    def entries(self, described: Distribution, keys: RowKeys) -> Entries:
        """Entries that sum to one; ``tail_N`` marks the sampled ones, all of weight w."""
        p, block_mass = fixed_point(described)
        total = block_mass.sum(-1, keepdim=True)
        ids = described.largest_ids(most_head(self.tau))
        top_p = p.gather(1, ids).double()
        num_head, num_tail, weight = split_head(top_p, total, tau=self.tau)
        head = torch.arange(ids.shape[1], device=p.device) < num_head
        p.scatter_(1, ids, top_p.masked_fill(head, 0).float())
        block_mass.scatter_add_(1, ids // BLOCK, -top_p.masked_fill(~head, 0))
        u = torch.from_numpy(keys.uniform(Purpose.TAIL_SAMPLING)).to(p.device)
        step = torch.arange(self.typical_entries(p.shape[1]), device=p.device)
        drawn = tokens_at((u + step) * weight, p, block_mass)
        masses = torch.cat([top_p, weight.expand(drawn.shape)], dim=1)
        rows_N, ids_N, logprobs_N, tail_N = compact(
            torch.cat([ids, drawn], dim=1),
            torch.cat([head, step < num_tail], dim=1),
            (masses / total).log().float(),
            (torch.arange(masses.shape[1], device=p.device) >= ids.shape[1]).expand(masses.shape),
        )
        return Entries(rows_N, ids_N, logprobs_N, no_rest(described), tail_N=tail_N)

    def typical_entries(self, vocab_size: int) -> int:
        """One per tau of probability, head or tail."""
        return min(math.ceil(1 / self.tau), vocab_size)

    @classmethod
    def _required(cls) -> frozenset[str]:
        return frozenset({"tau"})


def most_head(tau: float) -> int:
    """The largest head: 1/tau tokens, and 5 for the slack.

    h tokens of at least tau leave a tail of at most 1/tau - h + 1 draws. A token that joins has at
    least w, so it leaves (n - 1)w <= (n - 1)tau: one draw less. With the slack one token may come
    too many, and three join a single draw, each leaving 1e-6 of it: then nothing of 2^-52 is left.
    """
    return math.floor(1 / tau) + 5


def split_head(top_p_CK: Tensor, total_C1: Tensor, *, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """[C, 1] each: tokens in the head, tail draws n and tail weight w, from falling probabilities.

    The head takes tokens, largest first, while the next has at least ``tau`` or w(1 - 1e-6). From
    there w never grows, so every head value stays above w.
    """
    p = pad(top_p_CK, (0, 1))
    left = total_C1 - (p.cumsum(-1) - p)
    num_tail = (left / total_C1 / tau).ceil()
    weight = left / num_tail.clamp(min=1)
    ends = (p < tau * total_C1) & (p < weight * (1 - HEAD_SLACK)) | (p == 0)
    num_head = ends.int().argmax(-1, keepdim=True)
    return num_head, num_tail.gather(1, num_head).long(), weight.gather(1, num_head)
