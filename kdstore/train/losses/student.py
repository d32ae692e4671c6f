"""What losses read of the student, without a float32 copy of its logits.

A loss on sparse targets reads four things of each row of logits: its log-sum-exp, the same with
the entries masked out, the logits of the entries, and that of the label; each at one temperature or
more. `read_student` reads them in float32 a block of rows at a time; its backward rebuilds each
block from the logits. Both keep one block of float32 alive, never [S, V], and the gradient is
rounded to the logits' dtype once, after the student's probability and the teacher's were
subtracted. `read_block` and `total_grad` are the two halves, which `DistillHead` calls as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdstore.errors import SignalError

# 64 MiB of float32: large enough that launches do not dominate on a GPU, small beside the logits.
BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Reading:
    """What is read of logits / ``temperature`` beside the entries and the log-sum-exp.

    * ``outside``: the log-sum-exp of what is no entry
    * ``labels``: the logits of the labels
    """

    temperature: float = 1.0
    outside: bool = False
    labels: bool = False


@dataclass(frozen=True)
class Places:
    """Where to read: entry n is token ``ids_N[n]`` of position ``rows_N[n]``; CSR, int64.

    ``labels_S`` int64: the token at each position, if a reading asks for it.
    """

    indptr: Tensor
    rows_N: Tensor
    ids_N: Tensor
    labels_S: Tensor | None = None

    def check(self, *, vocab_size: int) -> None:
        """Raise SignalError unless every id is in ``[0, vocab_size)``; one wait for the device."""
        ids = self.ids_N if self.labels_S is None else torch.cat([self.ids_N, self.labels_S])
        if not ids.numel():
            return
        low, high = torch.stack(torch.aminmax(ids)).tolist()
        if low < 0 or high >= vocab_size:
            raise SignalError(
                "the signal has token ids that the student's logits do not have",
                expected=f"ids from 0 to {vocab_size - 1}",
                got=low if low < 0 else high,
                todo="train a student with the teacher's vocabulary, "
                "or dump a store for this student",
            )

    def blocks(self, *, width: int, rows: int | None = None) -> Iterator[Block]:
        """All positions in order, ``rows`` at a time (default: 64 MiB of float32 logits)."""
        size, step = len(self.indptr) - 1, rows or max(1, BLOCK_ELEMENTS // width)
        starts = list(range(0, size, step))
        ends = [*starts[1:], size]
        # Only more than one block has to ask the device where the entries are cut.
        cuts = self.indptr[ends].tolist() if len(starts) > 1 else [len(self.ids_N)]
        for start, end, first, last in zip(starts, ends, [0, *cuts], cuts, strict=False):
            yield self._block(slice(start, end), slice(first, last), width)

    def _block(self, rows: slice, entries: slice, width: int) -> Block:
        cells_N = (self.rows_N[entries] - rows.start) * width + self.ids_N[entries]
        if self.labels_S is None:
            return Block(rows, entries, cells_N, cells_N)
        labels_C = self.labels_S[rows]
        label_rows = torch.arange(len(labels_C), device=labels_C.device)
        return Block(rows, entries, cells_N, label_rows * width + labels_C)


@dataclass(frozen=True)
class Block:
    """Some positions, their entries, and the flat places of entries and labels in [C, V].

    Without labels there are no readings of them, and ``label_cells_C`` says nothing.
    """

    rows: slice
    entries: slice
    cells_N: Tensor
    label_cells_C: Tensor


class Read(NamedTuple):
    """One reading; also the gradient of one. What was not asked for is empty."""

    lse_S: Tensor
    outside_lse_S: Tensor
    logits_N: Tensor
    label_logits_S: Tensor


@dataclass(frozen=True)
class Student:
    """The student at S positions, at one temperature; float32 (float64 for float64 logits).

    ``logits_N`` are the entries' logits over the temperature.
    """

    read: Read
    rows_N: Tensor

    @property
    def logits_N(self) -> Tensor:
        """[N]: the entries' logits over the temperature."""
        return self.read.logits_N

    @property
    def log_s_N(self) -> Tensor:
        """[N]: log-probability of each entry."""
        return self.read.logits_N - self.read.lse_S[self.rows_N]

    @property
    def log_outside_S(self) -> Tensor:
        """[S]: log of the probability outside the entries, -inf if every token is one."""
        return self.read.outside_lse_S - self.read.lse_S

    @property
    def log_label_S(self) -> Tensor:
        """[S]: log-probability of the label."""
        return self.read.label_logits_S - self.read.lse_S


def read_student(
    logits: Tensor, rows_S: Tensor, places: Places, readings: Sequence[Reading]
) -> list[Student]:
    """The student by each reading, at the rows ``rows_S`` (distinct) of ``logits`` [..., V].

    Raises SignalError if an entry's id, or a label, is no column of the logits.

    >>> logits = torch.zeros(1, 3, 4)
    >>> one = torch.tensor([1])
    >>> places = Places(torch.tensor([0, 1]), one * 0, one * 2)
    >>> (student,) = read_student(logits, one, places, [Reading()])
    >>> student.log_s_N.exp().tolist()
    [0.25]
    """
    places.check(vocab_size=logits.shape[-1])
    flat = logits.reshape(-1, logits.shape[-1])
    found = _Student.apply(flat, rows_S, places, readings)  # type: ignore[no-untyped-call]
    return [Student(read, places.rows_N) for read in in_reads(found)]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What logits of a dtype are read in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_reads(tensors: Sequence[Tensor]) -> list[Read]:
    """A flat row of tensors, four for each reading, as the readings."""
    width = len(Read._fields)
    return [Read(*tensors[start : start + width]) for start in range(0, len(tensors), width)]


def empty_reads(
    like: Tensor, places: Places, readings: Sequence[Reading], *, dtype: torch.dtype
) -> list[Read]:
    """Room for what the readings will find."""
    size = len(places.indptr) - 1
    return [
        Read(
            like.new_empty(size, dtype=dtype),
            like.new_empty(size if reading.outside else 0, dtype=dtype),
            like.new_empty(len(places.ids_N), dtype=dtype),
            like.new_empty(size if reading.labels else 0, dtype=dtype),
        )
        for reading in readings
    ]


def part_of(read: Read, block: Block) -> Read:
    """A block's share of a reading."""
    rows = block.rows
    return Read(
        read.lse_S[rows],
        read.outside_lse_S[rows],
        read.logits_N[block.entries],
        read.label_logits_S[rows],
    )


def read_block(values_CV: Tensor, block: Block, reading: Reading) -> Read:
    """A reading of one block of logits in float32 or float64, which are left as they were."""
    values = values_CV if reading.temperature == 1 else values_CV / reading.temperature
    flat, none = values.view(-1), values.new_empty(0)
    chosen, lse, outside, label = flat[block.cells_N], values.logsumexp(-1), none, none
    if reading.labels:
        label = flat[block.label_cells_C]
    if reading.outside:
        flat[block.cells_N] = -torch.inf
        outside = values.logsumexp(-1)
        flat[block.cells_N] = chosen
    return Read(lse, outside, chosen, label)


def total_grad(
    values_CV: Tensor,
    block: Block,
    readings: Sequence[Reading],
    reads: Sequence[Read],
    grads: Sequence[Read],
) -> Tensor:
    """[C, V]: the gradient for the block's logits of all its readings together."""
    triples = zip(readings, reads, grads, strict=True)
    first, *others = (block_grad(values_CV, block, *one) for one in triples)
    for other in others:
        first += other
    return first


def block_grad(values_CV: Tensor, block: Block, reading: Reading, read: Read, grad: Read) -> Tensor:
    """[C, V]: the gradient for the block's logits, given the gradient of its reading.

    With g the gradients and s the softmax of a row it is
    ``(g_lse s + g_outside s_outside + scatter(g_entries, g_label)) / temperature``.
    """
    values = values_CV if reading.temperature == 1 else values_CV / reading.temperature
    total = _softmax_grad(values, read.lse_S, grad.lse_S)
    if reading.outside:
        values.view(-1)[block.cells_N] = -torch.inf
        total += _softmax_grad(values, read.outside_lse_S, grad.outside_lse_S)
        values.view(-1)[block.cells_N] = read.logits_N
    total.view(-1).index_add_(0, block.cells_N, grad.logits_N)
    if reading.labels:
        total.view(-1).index_add_(0, block.label_cells_C, grad.label_logits_S)
    return total if reading.temperature == 1 else total.div_(reading.temperature)


def _softmax_grad(values: Tensor, lse_S: Tensor, grad_S: Tensor) -> Tensor:
    """exp(values - lse) * grad, row by row; a row that is -inf everywhere gets zeros, not NaN."""
    finite = lse_S.masked_fill(lse_S == -torch.inf, 0.0)
    return (values - finite[:, None]).exp_().mul_(grad_S[:, None])


class _Student(torch.autograd.Function):
    """(logits [T, V], rows_S, places, readings) -> the tensors of each reading."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows_S: Tensor, places: Places, readings: Sequence[Reading]
    ) -> tuple[Tensor, ...]:
        dtype = wide(logits.dtype)
        reads = empty_reads(logits, places, readings, dtype=dtype)
        for block in places.blocks(width=logits.shape[1]):
            values = logits[rows_S[block.rows]].to(dtype)
            for reading, read in zip(readings, reads, strict=True):
                found = read_block(values, block, reading)
                for into, tensor in zip(part_of(read, block), found, strict=True):
                    into.copy_(tensor)
        found_all = tuple(tensor for read in reads for tensor in read)
        ctx.save_for_backward(logits, rows_S, *found_all)
        ctx.places, ctx.readings = places, readings
        return found_all

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, rows_S, *found = ctx.saved_tensors
        reads, wanted = in_reads(found), in_reads(grads)
        grad = torch.zeros_like(logits)
        for block in ctx.places.blocks(width=logits.shape[1]):
            values = logits[rows_S[block.rows]].to(reads[0].lse_S.dtype)
            total = total_grad(
                values,
                block,
                ctx.readings,
                [part_of(read, block) for read in reads],
                [part_of(want, block) for want in wanted],
            )
            grad.index_copy_(0, rows_S[block.rows], total.to(grad.dtype))
        return grad, None, None, None
