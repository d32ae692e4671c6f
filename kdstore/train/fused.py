"""Losses and gradients straight from hidden states, a chunk of positions at a time.

Of each chunk: logits = map(h Wᵀ + b) in float32, what the losses read of them, the losses, their
gradient for what was read, and from it by hand dz for the logits, dh = dz W and dW += dzᵀ h. Then
the chunk is dropped. So the forward pass makes three matrix products and the backward pass none.
The gradients it keeps are those of a sum; what comes in later (denominator, loss scale) multiplies
them in the end, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from kdstore.train.logit_map import LogitMap
from kdstore.train.losses.student import (
    BLOCK_ELEMENTS,
    Block,
    Read,
    Student,
    in_reads,
    read_block,
    total_grad,
    wide,
)
from kdstore.train.objective import Part, weighted

# However short, a chunk reads the weight twice, and reads and writes its gradient: 12 bytes an
# element in bfloat16. A position takes 6 operations an element. Where a device makes 300 operations
# in the time of a byte (H100), 600 positions are as much as that; a CPU makes far fewer.
CHUNK_ELEMENTS = {"cuda": 1 << 26}


def default_chunk(vocab_size: int, device: str) -> int:
    """Positions of a chunk: as many as have 64 MiB of logits in float32; on CUDA 256 MiB."""
    return max(1, CHUNK_ELEMENTS.get(device, BLOCK_ELEMENTS) // vocab_size)


@dataclass(frozen=True)
class FusedPart:
    """The losses of one teacher's signal, and how to get from hidden states to logits.

    ``chunk_tokens`` is `DistillHead`'s.
    """

    part: Part
    logit_map: LogitMap
    chunk_tokens: int | None = None

    def sums(self, block: Block, reads: Sequence[Read]) -> Tensor:
        """[n]: each loss's sum over a block."""
        signal = self.part.batch.signal.part(block.rows, block.entries)
        rows_N = self.part.places.rows_N[block.entries] - block.rows.start
        students = [Student(read, rows_N) for read in reads]
        return self.part.sums(students, signal, self.part.batch.weights_S[block.rows])

    def grads(self, block: Block, reads: Sequence[Read]) -> tuple[Tensor, list[Read]]:
        """The same, and the gradient of their weighted sum for what was read."""
        with torch.enable_grad():
            leaves = [Read(*(one.requires_grad_() for one in read)) for read in reads]
            sums_n = self.sums(block, leaves)
            total = weighted(sums_n, self.part.weights)
            flat = [one for leaf in leaves for one in leaf]
            found = torch.autograd.grad(total, flat, allow_unused=True, materialize_grads=True)
        return sums_n.detach(), in_reads(found)


def fused_sums(
    hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, fused: FusedPart
) -> tuple[Tensor, Tensor]:
    """Σ weight · loss over all positions, with a graph, and each loss's sum [n], without.

    Raises SignalError if an id that is read is no column of the logits, or is padding.

    float32 (float64 for a float64 weight) whatever the dtype of the rest. Under autocast products
    are in its dtype, as those of nn.Linear would be. Backward can be called once.
    """
    vocab_size = len(weight_VD)
    fused.part.places.check(vocab_size=min(vocab_size, fused.logit_map.num_ids or vocab_size))
    if not torch.is_grad_enabled():  # inside the function, inputs look as if they wanted gradients
        hidden_SD, weight_VD = hidden_SD.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    return _Fused.apply(hidden_SD, weight_VD, bias_V, fused)  # type: ignore[no-untyped-call,no-any-return]


class _Fused(torch.autograd.Function):
    """(hidden_SD, weight_VD, bias_V, fused) -> (weighted sum, sums_n)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, fused: FusedPart
    ) -> tuple[Tensor, Tensor]:
        chunk = fused.chunk_tokens or default_chunk(len(weight_VD), hidden_SD.device.type)
        work = _Work.begin(hidden_SD, weight_VD, bias_V, wanted=ctx.needs_input_grad)
        sums_n = torch.zeros(len(fused.part.losses), dtype=work.dtype, device=hidden_SD.device)
        with torch.autocast(hidden_SD.device.type, enabled=False):
            for block in fused.part.places.blocks(width=len(weight_VD), rows=chunk):
                sums_n += work.add(block, fused)
        ctx.grads = work.grads
        ctx.dtypes = hidden_SD.dtype, weight_VD.dtype, bias_V.dtype if bias_V is not None else None
        ctx.mark_non_differentiable(sums_n)
        return weighted(sums_n, fused.part.weights), sums_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradients of DistillHead are given out once; run it again")
        pairs = zip(ctx.grads, ctx.dtypes, strict=True)
        found = [None if one is None else one.mul_(grad).to(dtype) for one, dtype in pairs]
        ctx.grads = None
        return (*found, None)


@dataclass
class _Work:
    """The matrices of a pass in the dtype they are multiplied in, and the gradients so far."""

    hidden_SD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    dtype: torch.dtype
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]

    @classmethod
    def begin(
        cls,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        *,
        wanted: Sequence[bool],
    ) -> _Work:
        device = hidden_SD.device.type
        autocast = torch.is_autocast_enabled(device)
        by = torch.get_autocast_dtype(device) if autocast else weight_VD.dtype
        dtype = wide(weight_VD.dtype)
        tensors = (hidden_SD, weight_VD, bias_V)
        grads = tuple(
            torch.zeros_like(one, dtype=dtype) if one is not None and want else None
            for one, want in zip(tensors, wanted, strict=False)
        )
        bias = None if bias_V is None else bias_V.to(by)
        return cls(hidden_SD.to(by), weight_VD.to(by), bias, dtype, grads)  # type: ignore[arg-type]

    def add(self, block: Block, fused: FusedPart) -> Tensor:
        """[n]: the losses' sums over a block, whose gradients are added to the others'."""
        hidden_CD = self.hidden_SD[block.rows]
        answers = linear(hidden_CD, self.weight_VD, self.bias_V).to(self.dtype)
        logits = fused.logit_map.apply_(answers)
        readings = fused.part.readings
        reads = [read_block(logits, block, reading) for reading in readings]
        if not any(one is not None for one in self.grads):
            return fused.sums(block, reads)
        sums_n, wanted = fused.grads(block, reads)
        grad = total_grad(logits, block, readings, reads, wanted)
        self._add_grads(block, hidden_CD, fused.logit_map.backward_(grad, logits))
        return sums_n

    def _add_grads(self, block: Block, hidden_CD: Tensor, grad_CV: Tensor) -> None:
        for_hidden, for_weight, for_bias = self.grads
        if for_bias is not None:
            for_bias += grad_CV.sum(0)
        narrow_CV = grad_CV.to(hidden_CD.dtype)
        if for_hidden is not None:
            for_hidden[block.rows] = (narrow_CV @ self.weight_VD).to(self.dtype)
        if for_weight is None:
            return
        if hidden_CD.dtype == torch.bfloat16:  # products in it, summed in float32
            for_weight += narrow_CV.T @ hidden_CD
        else:  # in float16 a chunk's sum is soon above 65,504, and no loss scale would help
            for_weight.addmm_(grad_CV.T, hidden_CD.to(self.dtype))
