"""The contract of a selection.

A selection is a frozen dataclass whose fields are its options. It sees log-probabilities of a
bounded chunk of C positions and answers with the entries it keeps. It must not depend on which
positions share the chunk, and all its randomness comes from the keys it is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from kdstore.errors import UsageError
from kdstore.hashing import RowKeys


@dataclass(frozen=True)
class Entries:
    """Entries of C positions on a device: rows ascending, ids ascending within a row.

    ``rows_N``, ``ids_N`` int64, ``logprobs_N`` float32, ``rest_C`` float32 (log), ``counts_N``
    int64 (``counts`` only), ``tail_N`` bool (``pps`` only).
    """

    rows_N: Tensor
    ids_N: Tensor
    logprobs_N: Tensor
    rest_C: Tensor
    counts_N: Tensor | None = None
    tail_N: Tensor | None = None


@dataclass
class SelectionStats:
    """What selecting left behind: positions seen and probability lost to vocabulary padding."""

    num_positions: int = 0
    padding_mass: float = 0.0


@dataclass(frozen=True)
class Selection(ABC):
    """A rule that picks entries; its fields are its options."""

    kind: ClassVar[str]
    sampled: ClassVar[bool] = False

    @abstractmethod
    def entries(self, logp_CV: Tensor, keys: RowKeys) -> Entries:
        """Entries of float32 log-probabilities [C, V], whose rows ``keys`` names."""

    @abstractmethod
    def typical_entries(self, vocab_size: int) -> int:
        """About how many entries a position gets, for sizing work; at least 1."""

    def tempered(self, logp_CV: Tensor) -> Tensor:
        """The distribution that the entries describe: ``logp_CV`` unless a temperature is set."""
        return logp_CV

    @property
    def spec(self) -> str:
        """The canonical text of the rule, such as ``pps:tau=0.06``; defaults are left out."""
        options = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if field.name in self._required() or getattr(self, field.name) != field.default
        ]
        return ":".join([self.kind, ",".join(options)]) if options else self.kind

    @classmethod
    def _required(cls) -> frozenset[str]:
        return frozenset()


def require(condition: bool, selection: Selection, *, expected: str) -> None:
    """UsageError naming the selection unless the condition holds."""
    if not condition:
        raise UsageError(
            "selection option out of range",
            where=f"--select {selection.spec}",
            expected=expected,
            got=", ".join(f"{f.name}={getattr(selection, f.name)}" for f in fields(selection)),
        )


def entries_of_mask(kept_CV: Tensor, logp_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows, ids and float32 log-probabilities of a boolean mask, in ascending order."""
    rows_N, ids_N = kept_CV.nonzero(as_tuple=True)
    return rows_N, ids_N, logp_CV[rows_N, ids_N].to(torch.float32)


def rest_of_mask(kept_CV: Tensor, logp_CV: Tensor) -> Tensor:
    """float32 [C]: log-sum-exp of what was not kept, -inf if nothing was left."""
    return logp_CV.masked_fill(kept_CV, -torch.inf).double().logsumexp(-1).float()


def no_rest(logp_CV: Tensor) -> Tensor:
    """float32 [C] of -inf: the entries sum to one."""
    return logp_CV.new_full(logp_CV.shape[:1], -torch.inf)
