"""The ways to train an output layer that benchmarks.loss compares, and one measurement of one.

As a program it runs one method once in a fresh process and prints its peak memory:
``python -m benchmarks.loss_methods METHOD --vocab V …``. Memory is what a method needs beside the
hidden states and the weight; on CUDA by its allocator, else by the largest resident set.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax

from kdstore.readers.collate import Batch
from kdstore.signal import SparseSignal
from kdstore.train.fused import FusedPart, default_chunk, fused_sums
from kdstore.train.logit_map import LogitMap
from kdstore.train.losses import forward_kl
from kdstore.train.objective import Objective

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """T positions, vocabulary V, hidden size D, K entries of topk, dtype of states and weight."""

    tokens: int
    vocab: int
    hidden: int = 1024
    k: int = 50
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def chunk_tokens(self) -> int:
        """Positions of a chunk, as DistillHead takes them by default."""
        return default_chunk(self.vocab, self.device)


class Inputs:
    """Random hidden states and weight that want gradients, labels, and teachers' signals."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        generator = torch.Generator().manual_seed(0)
        self.hidden_TD = self._random(generator, setting.tokens)
        self.weight_VD = self._random(generator, setting.vocab)
        with torch.no_grad():
            self.weight_VD *= 0.05
        labels = torch.randint(setting.vocab, (setting.tokens,), generator=generator)
        self.labels_T = labels.to(setting.device)
        self.hidden_TD.requires_grad_()
        self.weight_VD.requires_grad_()

    def _random(self, generator: torch.Generator, rows: int) -> Tensor:
        values = torch.randn(rows, self.setting.hidden, generator=generator)
        return values.to(self.setting.device, DTYPES[self.setting.dtype])

    def batch(self, entries: int, selection: str) -> Batch:
        """A batch whose position t is answered by row t, with random entries."""
        setting = self.setting
        signal = random_signal(setting, entries, selection).to_torch(setting.device)
        tokens = torch.zeros(1, setting.tokens + 1, dtype=torch.long, device=setting.device)
        labels = tokens.clone()
        labels[0, 1:] = self.labels_T
        rows = torch.arange(setting.tokens, device=setting.device)
        ends = torch.tensor([0, setting.tokens + 1], dtype=torch.int32)
        weights = torch.ones(setting.tokens, device=setting.device)
        return Batch(
            tokens, tokens, None, ends, labels, signal, rows, weights, ["one"], setting.tokens + 1
        )

    @cached_property
    def topk(self) -> Batch:
        """K entries and the rest."""
        return self.batch(self.setting.k, f"topk:k={self.setting.k}")

    @cached_property
    def pps(self) -> Batch:
        """Nine entries that sum to one."""
        return self.batch(9, "pps:tau=0.036")


def random_signal(setting: Setting, entries: int, selection: str) -> SparseSignal:
    """Distinct ids in each position, of random probabilities; what pps does not have is rest."""
    rng = np.random.default_rng(entries)
    shape = (setting.tokens, entries)
    ids = rng.integers(0, setting.vocab // entries, shape) + np.arange(entries) * (
        setting.vocab // entries
    )
    mass = 1.0 if selection.startswith("pps") else 0.9
    p = rng.dirichlet(np.full(entries, 0.3), setting.tokens).clip(1e-9)
    p *= mass / p.sum(1, keepdims=True)
    rest = np.full(setting.tokens, np.log(1 - mass) if mass < 1 else -np.inf)
    indptr = np.arange(setting.tokens + 1) * entries
    scalars = {"entropy": -(p * np.log(p)).sum(1)}
    return SparseSignal.from_arrays(
        selection, indptr, ids.ravel(), np.log(p).ravel(), rest_S=rest, scalars=scalars
    )


class ChunkedCE(torch.autograd.Function):
    """Cross-entropy and nothing else, in chunks, in place, by hand: the lean yardstick."""

    @staticmethod
    def forward(
        ctx: object, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk: int
    ) -> Tensor:
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden_TD, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, len(hidden_TD), chunk):
            h, labels = hidden_TD[start : start + chunk], labels_T[start : start + chunk, None]
            z = linear(h, weight_VD).float()
            lse = z.logsumexp(1, keepdim=True)
            total += (lse - z.gather(1, labels)).sum()
            dz = z.sub_(lse).exp_().scatter_add_(1, labels, -torch.ones_like(lse)).to(h.dtype)
            grad_hidden[start : start + chunk] = (dz @ weight_VD).float()
            if dz.dtype == torch.float32:
                grad_weight.addmm_(dz.T, h)
            else:
                grad_weight += dz.T @ h
            del z, dz  # else they live on while the next chunk is made
        ctx.grads = grad_hidden, grad_weight  # type: ignore[attr-defined]
        return total / len(hidden_TD)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.grads  # type: ignore[attr-defined]
        del ctx.grads  # type: ignore[attr-defined]  # else autograd copies what it is given
        scale = grad / len(grad_hidden)
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None


def fused(inputs: Inputs, losses: dict[str, object], batch: Batch) -> Tensor:
    """Our losses from hidden states, as DistillHead computes them."""
    (part,) = Objective(losses).parts(batch, progress=0.0)
    total, _ = fused_sums(inputs.hidden_TD, inputs.weight_VD, None, FusedPart(part, LogitMap()))
    return total / len(batch.signal)


def ours_on_logits(inputs: Inputs) -> Tensor:
    """Our sparse loss on materialised logits."""
    logits = linear(inputs.hidden_TD, inputs.weight_VD)
    return forward_kl(logits, inputs.pps)


def plain_ce(inputs: Inputs) -> Tensor:
    """What a transformers model does with labels."""
    return cross_entropy(linear(inputs.hidden_TD, inputs.weight_VD).float(), inputs.labels_T)


def dense_kl(inputs: Inputs) -> Tensor:
    """KL to a teacher whose logits are made here too, both over the whole vocabulary."""
    with torch.no_grad():
        teacher = log_softmax(linear(inputs.hidden_TD.roll(1, 1), inputs.weight_VD).float(), 1)
    student = log_softmax(linear(inputs.hidden_TD, inputs.weight_VD).float(), 1)
    return kl_div(student, teacher, reduction="batchmean", log_target=True)


def gathered_topk(inputs: Inputs) -> Tensor:
    """KL over the top K as it is usually written: log-softmax of everything, then gather."""
    signal, k = inputs.topk.signal, inputs.setting.k
    ids, t = signal.ids_N.view(-1, k), signal.logprobs_N.view(-1, k)
    student = log_softmax(linear(inputs.hidden_TD, inputs.weight_VD).float(), 1)
    return (t.exp() * (t - student.gather(1, ids))).sum(1).mean()


def liger_chunked_jsd(inputs: Inputs) -> Tensor:
    """Liger's chunked JSD in plain torch, from states of both models; β = 0 is forward KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0,
        compiled=False,
        chunk_size=inputs.setting.chunk_tokens,
    )
    teacher = inputs.hidden_TD.detach().roll(1, 1)
    weight = inputs.weight_VD
    found: Tensor = loss(inputs.hidden_TD, weight, teacher, weight.detach(), inputs.labels_T)
    return found


def liger_triton_jsd(inputs: Inputs) -> Tensor:
    """Liger's Triton kernel for JSD, from hidden states of both models; CUDA only."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    teacher = inputs.hidden_TD.detach().roll(1, 1)
    weight = inputs.weight_VD
    found: Tensor = LigerFusedLinearJSD(jsd_beta=0.0)(
        inputs.hidden_TD, weight, teacher, weight.detach(), inputs.labels_T
    )
    return found


def liger_triton_ce(inputs: Inputs) -> Tensor:
    """Liger's Triton kernel for cross-entropy; CUDA only."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    found: Tensor = LigerFusedLinearCrossEntropyLoss()(
        inputs.weight_VD, inputs.hidden_TD, inputs.labels_T
    )
    return found


METHODS: dict[str, Callable[[Inputs], Tensor]] = {
    "ce_chunked": lambda i: ChunkedCE.apply(  # type: ignore[no-untyped-call]
        i.hidden_TD, i.weight_VD, i.labels_T, i.setting.chunk_tokens
    ),
    "fused_kl_pps": lambda i: fused(i, {"forward_kl": 1.0}, i.pps),
    "fused_kl_topk": lambda i: fused(i, {"forward_kl": 1.0}, i.topk),
    "fused_jsd_topk": lambda i: fused(i, {"jsd": 1.0}, i.topk),
    "fused_ce": lambda i: fused(i, {"ce": 1.0}, i.pps),
    "kl_pps_on_logits": ours_on_logits,
    "ce_plain": plain_ce,
    "kl_dense": dense_kl,
    "kl_topk_gathered": gathered_topk,
    "liger_chunked_jsd": liger_chunked_jsd,
    "liger_triton_jsd": liger_triton_jsd,
    "liger_triton_ce": liger_triton_ce,
}


def run_once(method: str, inputs: Inputs) -> float:
    """Forward and backward; seconds."""
    inputs.hidden_TD.grad = inputs.weight_VD.grad = None
    _wait(inputs.setting)
    began = time.perf_counter()
    METHODS[method](inputs).backward()  # type: ignore[no-untyped-call]
    _wait(inputs.setting)
    return time.perf_counter() - began


def peak_bytes(method: str, setting: Setting) -> int:
    """Bytes that a run needs at its peak beside its inputs; of a fresh process."""
    inputs = Inputs(setting)
    for batch in ("topk", "pps"):
        getattr(inputs, batch)
    small = Inputs(Setting(8, 64, 16, 4, setting.dtype, setting.device))
    run_once(method, small)  # what a first call of the library takes
    before = _reset_peak(setting)
    run_once(method, inputs)
    return _peak(setting) - before


def _wait(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(setting: Setting) -> int:
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set begins anew
    return _peak(setting)


def _peak(setting: Setting) -> int:
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [one for one in status if one.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print the peak memory of one method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--setting", type=json.loads, required=True)
    options = parser.parse_args()
    print(json.dumps({"peak_bytes": peak_bytes(options.method, Setting(**options.setting))}))


if __name__ == "__main__":
    main()
