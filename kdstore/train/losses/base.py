"""What all losses share: the kinds of target, the labels of a batch, and one reduction.

There is one denominator: positions that carry a signal. Token weights multiply the terms and do
not change it; gradient accumulation and several ranks pass their global count as `denominator`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, get_args

from torch import Tensor

from kdstore.errors import UsageError
from kdstore.signal import NO_ENTRIES

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch

Reduction = Literal["mean", "sum", "none"]

# Their entries are an unbiased draw: no rest, and sum(t̂ log t̂) says nothing about the teacher.
SAMPLED_KINDS = frozenset({"pps", "counts"})


class Loss(Protocol):
    """A loss of the student's logits [B, L, V] or [T, V] at the scored positions of a batch."""

    def __call__(
        self,
        logits: Tensor,
        batch: Batch,
        *,
        reduction: Reduction = "mean",
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        """Scalar, or [S] for ``reduction="none"``; float32, float64 for float64 logits."""
        ...


def is_sampled(selection: str) -> bool:
    """Whether a selection such as ``"pps:tau=0.06"`` draws its entries."""
    return selection.partition(":")[0] in SAMPLED_KINDS


def refuse_temperature(selection: str) -> None:
    """UsageError for a signal drawn at another temperature than the student's 1."""
    if is_sampled(selection) and "temperature=" in selection:
        raise UsageError(
            "the signal was drawn at another temperature than the loss compares at",
            where=f"signal {selection}",
            expected="a signal drawn at temperature 1",
            got=selection,
            todo="dump without the option temperature",
        )


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
