"""The teacher's distribution at C positions: what selections and scalars read.

Passes over the vocabulary are made once, when first asked for, in memory that the next chunk uses
again. Rows are padded to W columns, a whole number of blocks, with tokens of probability zero:
maxima and sums of blocks say where in a row to look, and all rows lie alike in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

BLOCK = 64
DEEP_LOG_MASS = -80.0  # float32 holds probabilities above it with full precision


@dataclass(frozen=True, eq=False)
class Scratch:
    """Three float32 [C, W] for one chunk after another.

    Fresh memory costs a page fault every 4 KB, on a CPU more time than the pass that fills it.
    ``spare_CW`` is for whoever makes the next pass.
    """

    shifted_CW: Tensor
    p_CW: Tensor
    spare_CW: Tensor

    @classmethod
    def empty(cls, rows: int, vocab_size: int, device: torch.device) -> Self:
        """For chunks of at most ``rows`` positions."""
        width = -(-vocab_size // BLOCK) * BLOCK
        return cls(*torch.empty(3, rows, width, dtype=torch.float32, device=device))

    def first(self, rows: int) -> Scratch:
        """The part for ``rows`` positions."""
        return Scratch(self.shifted_CW[:rows], self.p_CW[:rows], self.spare_CW[:rows])


@dataclass(frozen=True, eq=False)
class Distribution:
    """softmax of C rows of logits: ``shifted_CW`` plus ``largest_C``, the largest of a row.

    >>> rows = Distribution.of_logits(torch.tensor([[1.0, 2.0, 2.0]]))
    >>> rows.largest_ids(2).tolist(), rows.p_CW[0, :3].mul(100).round().tolist()
    ([[1, 2]], [16.0, 42.0, 42.0])
    """

    shifted_CW: Tensor
    largest_C: Tensor
    scratch: Scratch

    @classmethod
    def of_logits(cls, logits_CV: Tensor, scratch: Scratch | None = None) -> Self:
        """From logits in any float dtype; NaN and +inf, or no finite logit, make ``lse_C`` NaN."""
        C, V = logits_CV.shape
        scratch = (scratch or Scratch.empty(C, V, logits_CV.device)).first(C)
        shifted = scratch.shifted_CW
        shifted[:, :V] = logits_CV
        shifted[:, V:] = -torch.inf
        largest = shifted.amax(-1)
        return cls(shifted.sub_(largest[:, None]), largest, scratch)

    def tempered(self, temperature: float) -> Distribution:
        """softmax of the logits divided by ``temperature``."""
        scratch = replace(self.scratch, p_CW=torch.empty_like(self.shifted_CW))
        return Distribution(self.shifted_CW / temperature, self.largest_C / temperature, scratch)

    @cached_property
    def p_CW(self) -> Tensor:
        """float32 [C, W] probabilities; their sum ``total_C`` is one within 1e-5."""
        return torch.softmax(self.shifted_CW, -1, out=self.scratch.p_CW)

    @cached_property
    def total_C(self) -> Tensor:
        """float64 [C] sum of ``p_CW``."""
        return row_sums(self.p_CW)

    @cached_property
    def log_norm_C(self) -> Tensor:
        """float64 [C] log-sum-exp of ``shifted_CW``."""
        return (self.total_C / self.p_CW.amax(-1)).log()

    @property
    def lse_C(self) -> Tensor:
        """float64 [C] log-sum-exp of the logits."""
        return self.largest_C + self.log_norm_C

    def logprobs_at(self, ids_CK: Tensor) -> Tensor:
        """float32 [C, K] log-probabilities of some tokens."""
        return (self.shifted_CW.gather(1, ids_CK) - self.log_norm_C[:, None]).float()

    def log_mass_without(self, ids_CK: Tensor) -> Tensor:
        """float32 [C]: log-sum-exp of the log-probabilities of all tokens but some."""
        mass = self.p_CW.gather(1, ids_CK)
        self.p_CW.scatter_(1, ids_CK, 0)  # and back: a copy is another pass
        log_mass = (row_sums(self.p_CW) / self.total_C).log()
        self.p_CW.scatter_(1, ids_CK, mass)
        deep = log_mass < DEEP_LOG_MASS
        if bool(deep.any()):
            shifted = self.shifted_CW[deep].scatter(1, ids_CK[deep], -torch.inf)
            log_mass[deep] = shifted.logsumexp(-1) - self.log_norm_C[deep]
        return log_mass.float()

    def largest_ids(self, k: int) -> Tensor:
        """int64 [C, min(k, W)] ids of the most probable, these first; of equals the lowest ids.

        They lie in the k blocks of largest maximum, of equals the first. ``torch.topk`` of the
        values would leave ties, of which bfloat16 is full, to the device and the batch.
        """
        C, W = self.shifted_CW.shape
        values, ids = self.shifted_CW, torch.arange(W, device=self.shifted_CW.device)
        for size in (BLOCK, 8):
            if k * size < values.shape[1]:
                maxima = values.view(C, -1, size).amax(-1)
                firsts = _first_k(maxima, ids[..., ::size], k)
                ids = (firsts[:, :, None] + torch.arange(size, device=ids.device)).view(C, -1)
                values = self.shifted_CW.gather(1, ids)
        return _first_k(values, ids, min(k, W))


def row_sums(values_CW: Tensor) -> Tensor:
    """float64 [C] sums: float32 within a block, float64 over blocks."""
    return values_CW.view(len(values_CW), -1, BLOCK).sum(-1).sum(-1, dtype=torch.float64)


def order_keys(shifted: Tensor, ids: Tensor) -> Tensor:
    """int64 keys, ascending by value from zero down and among equals by id; values are float32."""
    return shifted.abs().view(torch.int32).long() << 32 | ids  # as ints, floats >= 0 keep order


def _first_k(shifted: Tensor, ids: Tensor, k: int) -> Tensor:
    """Of ``ids`` the k whose values are largest; of equals the lowest."""
    return order_keys(shifted, ids).topk(k, largest=False).values & 0xFFFFFFFF
