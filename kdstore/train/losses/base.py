"""What all losses share: what one is, the labels of a batch, and one reduction.

There is one denominator: positions that carry a signal. Token weights multiply the terms and do
not change it; gradient accumulation and several ranks pass their global count as `denominator`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from kdstore.errors import UsageError
from kdstore.signal import NO_ENTRIES
from kdstore.train.losses.student import Places, Reading, Student, read_student

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch
    from kdstore.signal import TorchSignal

Reduction = Literal["mean", "sum", "none"]

# Their entries are an unbiased draw: no rest, and sum(t̂ log t̂) says nothing about the teacher.
SAMPLED_KINDS = frozenset({"pps", "counts"})


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """A loss of the student's logits at a batch's scored positions; its fields are its options.

    It reads the student through ``reading`` and answers with one term for each position, so it runs
    alike on logits and, a chunk at a time, inside `DistillHead`. ``uses_entries`` is whether it
    needs the teacher's distributions.
    """

    name: ClassVar[str]
    uses_entries: ClassVar[bool] = True

    @abstractmethod
    def reading(self, signal: TorchSignal) -> Reading:
        """What it reads of the student; UsageError or SignalError if the signal will not do."""

    @abstractmethod
    def terms(self, student: Student, signal: TorchSignal) -> Tensor:
        """[S]: the loss at each position, unweighted, in the student's dtype."""

    def __call__(
        self,
        logits: Tensor,
        batch: Batch,
        *,
        reduction: Reduction = "mean",
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        """Scalar, or [S] for ``reduction="none"``; float32, float64 for float64 logits.

        ``logits`` are [B, L, V] or [T, V], of any float dtype.
        """
        reading = self.reading(batch.signal)
        places = places_of(batch, labels=reading.labels, entries=self.uses_entries)
        (student,) = read_student(logits, batch.logit_rows_S, places, [reading])
        terms_S = self.terms(student, batch.signal)
        return reduce_terms(terms_S, batch, reduction=reduction, denominator=denominator)


class LossFunction(Protocol):
    """A loss as a function: ``(logits, batch, **options)``; see ``Loss.__call__``."""

    def __call__(
        self,
        logits: Tensor,
        batch: Batch,
        *,
        reduction: Reduction = "mean",
        denominator: Tensor | float | None = None,
        **options: Any,
    ) -> Tensor:
        """As ``Loss.__call__``; ``options`` are the fields of the loss."""
        ...


def function_of(cls: type[Loss]) -> LossFunction:
    """The function of a loss's name, whose signature and help have the loss's own options."""

    def loss(
        logits: Tensor,
        batch: Batch,
        *,
        reduction: Reduction = "mean",
        denominator: Tensor | float | None = None,
        **options: Any,
    ) -> Tensor:
        return cls(**options)(logits, batch, reduction=reduction, denominator=denominator)

    shared = list(inspect.signature(loss).parameters.values())[:-1]
    own = inspect.signature(cls).parameters.values()
    vars(loss)["__signature__"] = inspect.Signature([*shared, *own], return_annotation="Tensor")
    loss.__name__ = loss.__qualname__ = cls.name
    loss.__doc__ = cls.__doc__
    return loss


def places_of(batch: Batch, *, labels: bool, entries: bool) -> Places:
    """Where losses read the student: at the entries of a batch's signal, and at its labels."""
    signal = batch.signal
    wanted = labels_S(batch) if labels else None
    if entries:
        refuse_without_entries(signal.selection)
        return Places(signal.indptr, signal.rows_N, signal.ids_N, wanted)
    none_N = signal.indptr.new_empty(0)
    return Places(signal.indptr.new_zeros(len(signal) + 1), none_N, none_N, wanted)


def is_sampled(selection: str) -> bool:
    """Whether a selection such as ``"pps:tau=0.06"`` draws its entries."""
    return selection.partition(":")[0] in SAMPLED_KINDS


def refuse_without_entries(selection: str) -> None:
    """UsageError for a signal of which only scalars were read."""
    if selection == NO_ENTRIES:
        raise UsageError(
            "the loss needs the teacher's distributions, which were not read",
            expected='"entries" among the columns',
            got="columns without it",
            todo='add "entries" to columns',
        )


def labels_S(batch: Batch) -> Tensor:
    """int64 [S]: the token at each scored position: it follows the row that predicts it."""
    return batch.labels.reshape(-1)[batch.logit_rows_S + 1]


def segment_sum(values_N: Tensor, rows_N: Tensor, *, rows: int) -> Tensor:
    """[S]: the sum over each position's entries."""
    return values_N.new_zeros(rows).index_add(0, rows_N, values_N)


def segment_logsumexp(values_N: Tensor, rows_N: Tensor, *, rows: int) -> Tensor:
    """[S]: the log-sum-exp over each position's entries; -inf where there is none."""
    largest_S = values_N.new_full((rows,), -torch.inf)
    largest_S = largest_S.scatter_reduce(0, rows_N, values_N.detach(), "amax")
    largest_S = largest_S.masked_fill(largest_S == -torch.inf, 0.0)
    sums_S = segment_sum((values_N - largest_S[rows_N]).exp(), rows_N, rows=rows)
    return sums_S.log() + largest_S


def reduce_terms(
    terms_S: Tensor,
    batch: Batch,
    *,
    reduction: Reduction = "mean",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Weighted terms, their sum, or their sum over ``denominator`` (default: S, at least 1).

    An empty batch gives a zero that still reaches the logits, so that no rank of a distributed
    step misses its gradient synchronisation.
    """
    if reduction not in get_args(Reduction):
        raise UsageError("unknown reduction", expected=get_args(Reduction), got=reduction)
    if denominator is not None and reduction != "mean":
        raise UsageError(
            "a denominator needs a mean to divide", expected="reduction='mean'", got=reduction
        )
    weighted = terms_S * batch.weights_S.to(terms_S.dtype)
    if reduction == "none":
        return weighted
    total = weighted.sum()
    if reduction == "sum":
        return total
    return total / (max(len(batch.signal), 1) if denominator is None else denominator)
