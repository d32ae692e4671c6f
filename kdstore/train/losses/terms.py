"""What a loss needs of the student's logits, without a float32 copy of them.

A loss on sparse targets reads three things of each row of logits: its log-sum-exp, the same with
the entries masked out, and the logits of the entries. `student_terms` computes them in float32 a
block of rows at a time; its backward rebuilds each block from the logits. Both keep one block of
float32 alive, never [S, V], and the gradient is rounded to the logits' dtype once, after the
student's probability and the teacher's were subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdstore.errors import SignalError

# 64 MiB of float32: large enough that launches do not dominate on a GPU, small beside the logits.
BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class StudentTerms:
    """The student at S positions, float32 (float64 for float64 logits).

    * ``lse_S``: log-sum-exp of all logits
    * ``outside_lse_S``: log-sum-exp of the logits that are no entry, -inf if every one is; None
      unless asked for
    * ``logits_N``: the logits of the entries
    """

    lse_S: Tensor
    outside_lse_S: Tensor | None
    logits_N: Tensor


@dataclass(frozen=True)
class Entries:
    """Where to read: entry n is token ``ids_N[n]`` of position ``rows_N[n]``; CSR, int64."""

    indptr: Tensor
    rows_N: Tensor
    ids_N: Tensor


def student_terms(
    logits: Tensor, rows_S: Tensor, entries: Entries, *, with_outside: bool = False
) -> StudentTerms:
    """The terms of the rows ``rows_S`` (distinct) of ``logits`` [..., V].

    Raises SignalError if an entry's id is no column of the logits.

    >>> logits = torch.zeros(1, 3, 4)
    >>> one = torch.tensor([1])
    >>> terms = student_terms(logits, one, Entries(torch.tensor([0, 1]), one * 0, one * 2))
    >>> terms.lse_S.exp().round().tolist(), terms.logits_N.tolist()
    ([4.0], [0.0])
    """
    check_ids(entries.ids_N, vocab_size=logits.shape[-1])
    flat = logits.reshape(-1, logits.shape[-1])
    lse, outside, chosen = _Terms.apply(flat, rows_S, entries, with_outside)  # type: ignore[no-untyped-call]
    return StudentTerms(lse, outside if with_outside else None, chosen)


def check_ids(ids_N: Tensor, *, vocab_size: int) -> None:
    """Raise SignalError unless every id is in ``[0, vocab_size)``; one wait for the device."""
    if not ids_N.numel():
        return
    low, high = torch.stack(torch.aminmax(ids_N)).tolist()
    if low < 0 or high >= vocab_size:
        raise SignalError(
            "the signal has token ids that the student's logits do not have",
            expected=f"ids from 0 to {vocab_size - 1}",
            got=low if low < 0 else high,
            todo="train a student with the teacher's vocabulary, or dump a store for this student",
        )


@dataclass(frozen=True)
class _Block:
    """A range of positions and, relative to it, its entries."""

    rows: slice
    entries: slice
    cells: Tensor  # flat index of each entry in the block's [rows, V]


def _blocks(entries: Entries, *, rows: int, width: int) -> Iterator[_Block]:
    step = max(1, BLOCK_ELEMENTS // width)
    starts = list(range(0, rows, step))
    ends = [*starts[1:], rows]
    # Only more than one block has to ask the device where the entries are cut.
    cuts = entries.indptr[ends].tolist() if len(starts) > 1 else [len(entries.ids_N)]
    for start, end, first, last in zip(starts, ends, [0, *cuts], cuts, strict=False):
        part = slice(first, last)
        yield _Block(
            slice(start, end),
            part,
            (entries.rows_N[part] - start) * width + entries.ids_N[part],
        )


class _Terms(torch.autograd.Function):
    """(logits [T, V], rows_S, entries, with_outside) -> (lse_S, outside_lse_S, logits_N).

    With g the incoming gradients and s the softmax of a row, the gradient of the row is
    ``g_lse s + g_outside s_outside + scatter(g_N)``.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows_S: Tensor, entries: Entries, with_outside: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        lse = logits.new_empty(len(rows_S), dtype=dtype)
        outside = logits.new_empty(len(rows_S) if with_outside else 0, dtype=dtype)
        chosen = logits.new_empty(len(entries.ids_N), dtype=dtype)
        for block in _blocks(entries, rows=len(rows_S), width=logits.shape[1]):
            values = logits[rows_S[block.rows]].to(dtype)
            flat = values.view(-1)
            chosen[block.entries] = flat[block.cells]
            lse[block.rows] = values.logsumexp(-1)
            if with_outside:
                flat[block.cells] = -torch.inf
                outside[block.rows] = values.logsumexp(-1)
        ctx.save_for_backward(logits, rows_S, lse, outside)
        ctx.entries, ctx.with_outside = entries, with_outside
        return lse, outside, chosen

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_lse: Tensor, grad_outside: Tensor, grad_chosen: Tensor
    ) -> tuple[Tensor, None, None, None]:
        logits, rows_S, lse, outside = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        for block in _blocks(ctx.entries, rows=len(rows_S), width=logits.shape[1]):
            values = logits[rows_S[block.rows]].to(lse.dtype)
            rows = block.rows
            total = _softmax_grad(values, lse[rows], grad_lse[rows])
            if ctx.with_outside:
                values.view(-1)[block.cells] = -torch.inf
                total += _softmax_grad(values, outside[rows], grad_outside[rows])
            total.view(-1).index_add_(0, block.cells, grad_chosen[block.entries])
            grad.index_copy_(0, rows_S[rows], total.to(grad.dtype))
        return grad, None, None, None


def _softmax_grad(values: Tensor, lse_S: Tensor, grad_S: Tensor) -> Tensor:
    """exp(values - lse) * grad, row by row; a row that is -inf everywhere gets zeros, not NaN."""
    finite = lse_S.masked_fill(lse_S == -torch.inf, 0.0)
    return (values - finite[:, None]).exp_().mul_(grad_S[:, None])
