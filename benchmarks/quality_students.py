"""Students of ``benchmarks.quality``: how they are made, trained and judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.scored import Text
from kdstore.readers.collate import Batch, Collator
from kdstore.readers.store import Store
from kdstore.train.losses import LOSSES

READ_AT_ONCE = 32  # windows; of `full`, with 127 positions of 4,096 tokens each, 130 MB


@dataclass(frozen=True)
class StudentConfig:
    """A student and how it is trained: AdamW, linear warm-up, then a linear fall to zero.

    Gradients are clipped. ``first_rate`` is the learning rate of what comes before all arms.
    """

    vocab_size: int = 4096
    width: int = 128
    layers: int = 2
    heads: int = 4
    learning_rate: float = 1e-3
    first_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: float = 0.2  # of all steps
    max_gradient_norm: float = 1.0
    batch_windows: int = 1


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one student learns from.

    * ``labels_WS`` int64: drawn labels of each window of the store, which ``ce`` is trained on
    * ``losses``: loss name to weight
    * ``draws``: epoch e reads draw e mod ``draws`` of the store
    """

    store: Store
    labels_WS: NDArray[np.int64]
    losses: Mapping[str, float]
    epochs: int = 1
    draws: int = 1


def train_student(
    model: LlamaForCausalLM, config: StudentConfig, lesson: Lesson, *, seed: int
) -> LlamaForCausalLM:
    """The trained model, which is changed; the order of windows depends on ``seed`` alone."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=0.0
    )
    steps = lesson.epochs * -(-len(lesson.store) // config.batch_windows)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_at(step, steps, warmup=config.warmup)
    )
    for batch in batches(lesson, config.batch_windows, seed=seed):
        logits = model(**batch.model_inputs()).logits
        parts = [w * LOSSES[name]()(logits, batch) for name, w in lesson.losses.items()]
        loss: Tensor = torch.stack(parts).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def new_student(config: StudentConfig, *, seed: int) -> LlamaForCausalLM:
    """A small Llama with tied embeddings and weights of ``seed``."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.width * 8 // 3,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


def rate_at(step: int, steps: int, *, warmup: float) -> float:
    """The share of the learning rate at a step: up to 1 over the warm-up, then down towards 0."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise + 1)


def batches(lesson: Lesson, size: int, *, seed: int) -> Iterator[Batch]:
    """Batches of so many windows, every epoch in another order, with the drawn labels.

    A loader's order depends on row groups, which are other ones for every selection; this one is
    the same for every store of the same windows.
    """
    collate, shuffled = Collator(), np.random.default_rng(seed)
    at_once = size * max(1, READ_AT_ONCE // size)
    for epoch in range(lesson.epochs):
        order = shuffled.permutation(len(lesson.store))
        for first in range(0, len(order), at_once):
            rows = order[first : first + at_once].tolist()
            samples = lesson.store.__getitems__([(row, epoch % lesson.draws) for row in rows])
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                yield with_labels(collate(samples[part]), lesson.labels_WS[rows[part]])


def with_labels(batch: Batch, labels_BS: NDArray[np.int64]) -> Batch:
    """The batch with other labels at its scored positions, sample after sample."""
    labels = torch.full_like(batch.labels, -100)
    labels.view(-1)[batch.logit_rows_S + 1] = torch.from_numpy(labels_BS.reshape(-1))
    return replace(batch, labels=labels)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out windows and what the dense teacher says of them.

    * ``ids_WT`` int64
    * ``teacher_WSV`` float32: probabilities at the scored positions
    """

    ids_WT: Tensor
    teacher_WSV: Tensor

    @classmethod
    def of_windows(cls, windows: Sequence[Text], logits_WSV: Tensor) -> HeldOut:
        """From windows and the teacher's logits."""
        ids = torch.from_numpy(np.stack([window.ids_T for window in windows]).astype(np.int64))
        return cls(ids, logits_WSV.float().softmax(-1))

    @property
    def entropy(self) -> float:
        """Nats: the least that ``cross_entropy`` can be."""
        return -float(torch.special.xlogy(self.teacher_WSV, self.teacher_WSV).sum(-1).mean())

    @torch.inference_mode()
    def cross_entropy(self, model: LlamaForCausalLM, *, windows_at_once: int = 8) -> float:
        """Mean over positions of -Σ t(v) log s(v), in nats."""
        total = 0.0
        for start in range(0, len(self.ids_WT), windows_at_once):
            rows = slice(start, start + windows_at_once)
            log_s = model(self.ids_WT[rows], use_cache=False).logits[:, :-1].log_softmax(-1)
            total -= float((self.teacher_WSV[rows] * log_s).sum(dtype=torch.float64))
        return total / (self.teacher_WSV.shape[0] * self.teacher_WSV.shape[1])
