"""Every loss again, dense and in float64: what the sparse ones are held against.

A case is the student's logits and the teacher's probabilities over the vocabulary, which entries
were kept, and the options of the loss. Nothing is shared with the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdstore.readers.collate import Batch
from kdstore.signal import SparseSignal
from tests.train.train_helpers import entropy_S, log_softmax, one_sample_batch, signal_of_mask

DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "skew_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
    "tvd": {},
}
RANKINGS: dict[str, dict[str, Any]] = {"hinge": {"margin": 0.7}, "logistic_ranking": {}}
ON_LABELS: dict[str, dict[str, Any]] = {"ce": {}, "policy_gradient": {"clip": 0.2}}
ALL = {**DIVERGENCES, **RANKINGS, **ON_LABELS}


@dataclass(frozen=True, eq=False)
class Case:
    """Teacher logits [S, V] and the cells of them that were kept; labels [S]."""

    teacher: NDArray[np.float64]
    keep: NDArray[np.bool_]
    labels: NDArray[np.int64]
    selection: str = "topk:k=3"

    def signal(self, *, temperatures: tuple[float, ...] = ()) -> SparseSignal:
        """The kept cells, their rest, and all scalars."""
        logp = log_softmax(self.teacher)
        with np.errstate(divide="ignore"):
            rest = np.log(np.where(self.keep, 0, np.exp(logp)).sum(1))
        scalars = {
            "entropy": entropy_S(logp),
            "label_logprob": np.take_along_axis(logp, self.labels[:, None], 1)[:, 0],
            "behaviour_logprob": np.linspace(-3, -0.5, len(logp)),
        }
        for T in temperatures:
            scalars[f"lse_T{T:g}"] = np.log(np.exp(logp / T).sum(1))
        return signal_of_mask(self.selection, logp, self.keep, rest_S=rest, scalars=scalars)

    def batch(self, *, temperatures: tuple[float, ...] = ()) -> Batch:
        """One sample whose logit row s answers position s."""
        return one_sample_batch(self.signal(temperatures=temperatures), self.labels)


def topk_mask(logits: NDArray[np.float64], k: int) -> NDArray[np.bool_]:
    """The k largest of each row."""
    keep = np.zeros_like(logits, dtype=bool)
    np.put_along_axis(keep, np.argsort(-logits, 1)[:, :k], True, 1)
    return keep


def reference(
    name: str,
    logits: Tensor,
    case: Case,
    *,
    temperature: float = 1.0,
    outside: str = "rest",
    **options: Any,
) -> Tensor:
    """float64 [S]: the loss at each position."""
    if name in RANKINGS:
        return _ranking(name, logits, case, **options)
    if name in ON_LABELS:
        return _on_labels(name, logits, case, **options)
    T = temperature
    t = torch.softmax(torch.from_numpy(case.teacher) / T, 1)
    s = torch.softmax(logits / T, 1)
    keep = torch.from_numpy(case.keep)
    t_in, s_in = t * keep, s * keep
    if outside == "renormalize":
        t_in, s_in = t_in / t_in.sum(1, keepdim=True), s_in / s_in.sum(1, keepdim=True)
    terms = _summand(name, t_in, s_in, **options).where(keep, 0.0).sum(1)
    if outside == "rest":
        t_out, s_out = (t * ~keep).sum(1), (s * ~keep).sum(1)
        some = ~keep.all(1)
        terms = terms + _summand(name, t_out, s_out, **options).where(some, 0.0)
    return T**2 * terms


def _summand(name: str, t: Tensor, s: Tensor, *, beta: float = 0.5, alpha: float = 0.1) -> Tensor:
    t, s = t.clamp(min=1e-300), s.clamp(min=1e-300)
    if name == "forward_kl":
        return t * (t / s).log()
    if name == "reverse_kl":
        return s * (s / t).log()
    if name == "jsd":
        m = beta * t + (1 - beta) * s
        return beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()
    if name == "skew_kl":
        return t * (t / (alpha * t + (1 - alpha) * s)).log()
    if name == "skew_reverse_kl":
        return s * (s / (alpha * s + (1 - alpha) * t)).log()
    assert name == "tvd"
    return (t - s).abs() / 2


def _ranking(name: str, logits: Tensor, case: Case, *, margin: float = 1.0) -> Tensor:
    terms = []
    for row, (teacher, keep) in enumerate(zip(case.teacher, case.keep, strict=True)):
        ids = np.flatnonzero(keep)
        pairs = [(i, j) for i in ids for j in ids if teacher[i] > teacher[j]]
        differences = [logits[row, i] - logits[row, j] for i, j in pairs]
        if name == "hinge":
            values = [(margin - d).clamp(min=0) for d in differences]
        else:
            values = [torch.log1p(torch.exp(-d)) for d in differences]
        terms.append(torch.stack(values).mean() if values else logits[row, 0] * 0)
    return torch.stack(terms)


def _on_labels(name: str, logits: Tensor, case: Case, *, clip: float | None = None) -> Tensor:
    labels = torch.from_numpy(case.labels)[:, None]
    log_s = torch.log_softmax(logits, 1).gather(1, labels)[:, 0]
    if name == "ce":
        return -log_s
    signal = case.signal()
    log_t = torch.from_numpy(signal.scalars["label_logprob"]).double()
    behaviour = torch.from_numpy(signal.scalars["behaviour_logprob"]).double()
    advantage, ratio = log_t - log_s.detach(), (log_s - behaviour).exp()
    if clip is None:
        return -ratio * advantage
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.where(ratio * advantage < clipped * advantage, -ratio, -clipped) * advantage
