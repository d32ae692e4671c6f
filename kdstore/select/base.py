"""The contract of a selection.

A selection is a frozen dataclass whose fields are its options. It sees the distribution of a
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
from kdstore.select.distribution import Distribution

MAX_ID = 1 << 31


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
    def entries(self, described: Distribution, keys: RowKeys) -> Entries:
        """Entries of what ``describes`` gave, whose rows ``keys`` names."""

    @abstractmethod
    def typical_entries(self, vocab_size: int) -> int:
        """About how many entries a position gets, for sizing work; at least 1."""

    def describes(self, teacher: Distribution) -> Distribution:
        """The distribution that the entries describe: the teacher's, unless tempered."""
        return teacher

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


def compact(ids_CK: Tensor, kept_CK: Tensor, *values_CK: Tensor) -> tuple[Tensor, ...]:
    """rows, ids and values [N] of what is kept, rows ascending and ids ascending within a row."""
    ids_CK, order = ids_CK.masked_fill(~kept_CK, MAX_ID).sort(-1)
    rows_N, at_N = (ids_CK < MAX_ID).nonzero(as_tuple=True)
    values = [value.gather(1, order)[rows_N, at_N] for value in values_CK]
    return (rows_N, ids_CK[rows_N, at_N], *values)


def no_rest(described: Distribution) -> Tensor:
    """float32 [C] of -inf: the entries sum to one."""
    return torch.full_like(described.largest_C, -torch.inf)
