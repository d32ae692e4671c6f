"""Dense float64 references, and distributions that selections get wrong."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kdstore.hashing import RowKeys
from kdstore.select import parse_selection, select
from kdstore.signal import SparseSignal

SPECS = ("topk:k=5", "topp:p=0.9", "pps:tau=0.06", "pps:tau=0.3", "counts:n=50", "full")


def softmax(logits: torch.Tensor) -> NDArray[np.float64]:
    return logits.double().softmax(-1).numpy()


def logits_of(probabilities: list[float], vocab_size: int) -> torch.Tensor:
    """One row of logits whose softmax is the given probabilities, zero elsewhere."""
    row = torch.full((vocab_size,), -torch.inf, dtype=torch.float64)
    row[: len(probabilities)] = torch.tensor(probabilities, dtype=torch.float64).log()
    return row[None].float()


def hard_rows(vocab_size: int) -> dict[str, torch.Tensor]:
    """Rows at the edges: no tail, a tail of 1e-9, no head, ties, a head of 1 - 1e-4."""
    generator = torch.Generator().manual_seed(vocab_size)
    tiny_tail = torch.full((vocab_size,), 1e-9 / (vocab_size - 1), dtype=torch.float64)
    tiny_tail[7] = 1 - 1e-9
    head = torch.full((vocab_size,), 1e-4 / (vocab_size - 3), dtype=torch.float64)
    head[[1, 5, 9]] = torch.tensor([0.5, 0.3, 0.2 - 1e-4], dtype=torch.float64)
    return {
        "no tail": logits_of([0.5, 0.3, 0.2], vocab_size),
        "one token": logits_of([1.0], vocab_size),
        "tail of 1e-9": tiny_tail.log()[None].float(),
        "head of 1 - 1e-4": head.log()[None].float(),
        "no head": torch.zeros(1, vocab_size),
        "ties": torch.randint(0, 3, (4, vocab_size), generator=generator).float(),
        "peaked": torch.randn(4, vocab_size, generator=generator) * 6,
        "flat": torch.randn(4, vocab_size, generator=generator),
        "falling": -torch.arange(vocab_size).float()[None] * 0.7,
    }


def keys_for(count: int, *, seed: int = 0) -> RowKeys:
    return RowKeys.of_samples([("sample", np.arange(1, count + 1))], seed=seed)


def select_rows(
    logits: torch.Tensor, spec: str, *, seed: int = 0, **options: object
) -> SparseSignal:
    labels = torch.zeros(len(logits), dtype=torch.long)
    return select(
        logits,
        labels,
        selection=parse_selection(spec),
        keys=keys_for(len(logits), seed=seed),
        **options,  # type: ignore[arg-type]
    )


def reference_head(p: NDArray[np.float64], *, tau: float) -> tuple[NDArray[np.bool_], int, float]:
    """Head, tail draws and tail weight of one row of pps, by full passes until nothing joins."""
    total = p.sum()
    head = p >= tau * total
    while True:
        mass = p[~head].sum()
        num_tail = int(np.ceil(mass / total / tau))
        weight = mass / max(num_tail, 1)
        joins = (p >= weight * (1 - 1e-6)) & (p > 0) & ~head
        if not joins.any():
            return head, num_tail, weight / total
        head |= joins
