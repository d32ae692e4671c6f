"""Cross-entropy and perplexity of a model on held-out samples, summed before they are divided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdstore.errors import UsageError
from kdstore.sample import Sample
from kdstore.train.losses.ce import label_nll


@dataclass(frozen=True)
class EvalBatch:
    """Right-padded ``input_ids`` and ``attention_mask`` int64 [B, L], and what is scored.

    Row ``rows_S`` of the flat logits predicts token ``labels_S``, both int64 [S].
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows_S: Tensor
    labels_S: Tensor

    def to(self, device: torch.device) -> EvalBatch:
        """The same batch on another device."""
        return EvalBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def evaluate_model(
    model: nn.Module, samples: Sequence[Sample], batch_size: int = 8
) -> dict[str, float]:
    """``loss`` in nats per scored token, ``perplexity`` = exp(loss) and ``num_tokens``.

    Scored are the positions in each sample's runs. Raises UsageError if there are none.
    """
    return metrics_of_sums(nll_sums(model, samples, batch_size=batch_size))


def nll_sums(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """float64 [2]: this rank's sum of -log s(token), and number of tokens scored.

    Every rank runs the model equally often, as sharded models need; the batches that make up
    the number count for nothing.
    """
    batches = _batches(samples, batch_size=batch_size)
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64)
    with _eval_mode(model), torch.no_grad():
        for index in range(rank, rank + len(batches), world_size):
            counts = index < len(batches)
            batch = collate_for_eval(batches[min(index, len(batches) - 1)]).to(device)
            found = _batch_sums(model, batch)
            if counts:
                sums += found
    return sums


def metrics_of_sums(sums: Tensor) -> dict[str, float]:
    """``loss``, ``perplexity`` and ``num_tokens`` of summed nats and tokens."""
    nats, tokens = sums.tolist()
    if not tokens:
        raise UsageError(
            "nothing to evaluate: no position of the held-out samples is scored",
            expected="samples of two tokens or more with scored runs",
            todo="check eval.data and eval.max_length, or set eval.score to all",
        )
    loss = nats / tokens
    perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()
    return {"loss": loss, "perplexity": perplexity, "num_tokens": int(tokens)}


def collate_for_eval(samples: Sequence[Sample]) -> EvalBatch:
    """A right-padded batch; padding is known by length, never by token id."""
    length = max(sample.num_tokens for sample in samples)
    input_ids = np.zeros((len(samples), length), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    rows, labels = [], []
    for index, sample in enumerate(samples):
        input_ids[index, : sample.num_tokens] = sample.input_ids_T
        mask[index, : sample.num_tokens] = 1
        rows.append(index * length + sample.positions_S - 1)
        labels.append(sample.input_ids_T[sample.positions_S].astype(np.int64))
    arrays = (input_ids, mask, np.concatenate(rows), np.concatenate(labels))
    return EvalBatch(*(torch.from_numpy(array) for array in arrays))


def _batches(samples: Sequence[Sample], *, batch_size: int) -> list[list[Sample]]:
    """Batches of neighbours in length, longest first: least padding, and too long fails early."""
    scored = [sample for sample in samples if sample.num_scored]
    ordered = sorted(scored, key=lambda sample: -sample.num_tokens)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _batch_sums(model: Any, batch: EvalBatch) -> Tensor:
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    nll_S = label_nll(output.logits, batch.rows_S, batch.labels_S)
    # float64 on the host: not every device has it.
    return torch.tensor([nll_S.sum().item(), len(nll_S)], dtype=torch.float64)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
