"""A model on held-out samples: sums over batches and ranks, which are divided once, at the end.

Of every scored token: its cross-entropy, and whether the student's own first guess, made with some
confidence, was right. Where samples carry a teacher's signal, also how the two agree. Logits are
looked at a block of rows at a time; with a `DistillHead` they never exist together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from kdstore.errors import UsageError
from kdstore.readers.collate import Batch, Collator
from kdstore.sample import Sample
from kdstore.signal import NO_ENTRIES, SparseSignal, TorchSignal
from kdstore.teachers.probe import evaluating
from kdstore.train.head import DistillHead
from kdstore.train.losses.base import is_sampled, labels_S, segment_sum
from kdstore.train.losses.forward_kl import ForwardKL
from kdstore.train.losses.student import Places, Reading, Student, read_block, wide
from kdstore.train.objective import check_rows

CALIBRATION_BINS = 15
_TOTALS = ("nats", "tokens", "kl", "kl_tokens", "agreed", "ranked", "accepted", "exact")
_NUM_SUMS = len(_TOTALS) + 3 * CALIBRATION_BINS


def evaluate_model(
    model: nn.Module, samples: Sequence[Sample], batch_size: int = 8
) -> dict[str, float]:
    """The metrics of ``metrics_of_sums`` over the positions in each sample's runs.

    Raises UsageError if there are none.
    """
    return metrics_of_sums(evaluation_sums(model, samples, batch_size=batch_size))


def evaluation_sums(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """float64 [n], on the host: this rank's sums, which may be added to other ranks'.

    Every rank runs the model equally often, as sharded models need; the batches that make up
    the number count for nothing.
    """
    batches = _batches(samples, batch_size=batch_size)
    device = next(model.parameters()).device
    has_head = any(isinstance(module, DistillHead) for module in model.modules())
    sums_of = _sums_of_head if has_head else _sums_of_logits
    sums = torch.zeros(_NUM_SUMS, dtype=torch.float64)
    with evaluating(model), torch.no_grad():
        for index in range(rank, rank + len(batches), world_size):
            counts = index < len(batches)
            batch = collate_for_eval(batches[min(index, len(batches) - 1)]).to(device)
            found = sums_of(model, batch)
            if counts:
                sums += found
    return sums


def metrics_of_sums(sums: Tensor) -> dict[str, float]:
    """Metrics of summed positions; those of a teacher only where there was one.

    * ``loss``: cross-entropy in nats per token; ``perplexity`` = exp(loss); ``num_tokens``
    * ``ece``: expected calibration error of the first guess, 15 bins of equal width (Guo et al.
      2017, arXiv:1706.04599, equation 3)
    * ``kl``: KL(teacher || student) in nats, to the stored signal
    * ``top1_agreement``: share of positions where both have the same most likely token; of ``pps``
      those whose most likely token is known. Not of ``counts``
    * ``acceptance``: Σ min(s, t), the share of the student's drafts that speculative decoding would
      accept (Leviathan et al. 2023, arXiv:2211.17192, theorem 3.5), tokens without an entry counted
      as one. Of ``topk``, ``topp`` and ``full``
    """
    total = dict(zip(_TOTALS, sums[: len(_TOTALS)].tolist(), strict=True))
    if not total["tokens"]:
        raise UsageError(
            "nothing to evaluate: no position of the held-out samples is scored",
            expected="samples of two tokens or more with scored runs",
            todo="check eval.data and eval.max_length, or set eval.score to all",
        )
    loss = total["nats"] / total["tokens"]
    perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()
    _, confidence, right = sums[len(_TOTALS) :].view(3, CALIBRATION_BINS)
    shares = {
        "kl": (total["kl"], total["kl_tokens"]),
        "top1_agreement": (total["agreed"], total["ranked"]),
        "acceptance": (total["accepted"], total["exact"]),
    }
    return {
        "loss": loss,
        "perplexity": perplexity,
        "num_tokens": int(total["tokens"]),
        "ece": (confidence - right).abs().sum().item() / total["tokens"],
        **{name: value / count for name, (value, count) in shares.items() if count},
    }


def collate_for_eval(samples: Sequence[Sample]) -> Batch:
    """A padded batch of samples with or without a signal."""
    return Collator()([_with_some_signal(sample) for sample in samples])


def _with_some_signal(sample: Sample) -> Sample:
    if sample.signal is not None:
        return sample
    nothing = SparseSignal.from_arrays(NO_ENTRIES, [0] * (sample.num_scored + 1), [], [])
    return replace(sample, signal=nothing)


def _batches(samples: Sequence[Sample], *, batch_size: int) -> list[list[Sample]]:
    """Batches of neighbours in length, longest first: least padding, and too long fails early.

    Those of a batch have signals of one kind, or all none.
    """
    kinds: dict[tuple[str, ...], list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: -sample.num_tokens):
        if sample.num_scored:
            kinds.setdefault(_kind_of(sample), []).append(sample)
    batches = [
        same[start : start + batch_size]
        for same in kinds.values()
        for start in range(0, len(same), batch_size)
    ]
    return sorted(batches, key=lambda batch: -batch[0].num_tokens)


def _kind_of(sample: Sample) -> tuple[str, ...]:
    signal = sample.signal
    return () if signal is None else (signal.selection, *sorted(signal.scalars))


def _sums_of_head(model: Any, batch: Batch) -> Tensor:
    found: Tensor = model(**batch.model_inputs(), distill=_Evaluation(batch)).sums
    return found


def _sums_of_logits(model: Any, batch: Batch) -> Tensor:
    logits = model(**batch.model_inputs()).logits
    check_rows(logits, batch)
    flat = logits.reshape(-1, logits.shape[-1])
    return _sums(batch, flat.shape[1], lambda rows: flat[rows].to(wide(flat.dtype)))


@dataclass
class _Sums(ModelOutput):  # type: ignore[misc]
    sums: Tensor | None = None


@dataclass(frozen=True)
class _Evaluation:
    """The sums of a batch, as a request to a `DistillHead`."""

    batch: Batch

    def answer(self, head: DistillHead, hidden_TD: Tensor) -> tuple[Tensor, ...]:
        """From the logits of a block of rows at a time."""
        check_rows(hidden_TD, self.batch)
        width = len(head.weight)
        return (_sums(self.batch, width, lambda rows: head.logits(hidden_TD[rows])),)

    def output(self, model: Any, answer: tuple[Tensor, ...], output: Any) -> ModelOutput:
        """The sums alone."""
        return _Sums(sums=answer[0])


def _sums(batch: Batch, width: int, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    """float64 [n] on the host, as not every device has float64."""
    signal, labels = batch.signal, labels_S(batch)
    places = Places(signal.indptr, signal.rows_N, signal.ids_N, labels)
    places.check(vocab_size=width)
    reading = Reading(labels=True, outside=_is_exact(signal))
    sums = torch.zeros(_NUM_SUMS, dtype=torch.float64)
    for block in places.blocks(width=width):
        values = logits_of(batch.logit_rows_S[block.rows])
        rows_N = places.rows_N[block.entries] - block.rows.start
        student = Student(read_block(values, block, reading), rows_N)
        part = signal.part(block.rows, block.entries)
        calibration = _calibration(student, values, labels[block.rows])
        sums += torch.cat([_totals(student, part, values), calibration]).to("cpu", torch.float64)
    return sums


def _totals(student: Student, signal: TorchSignal, values_CV: Tensor) -> Tensor:
    """float [8]: the sums of ``_TOTALS`` over a block."""
    count = values_CV.new_tensor(float(len(signal)))
    none = torch.zeros_like(count)
    found = {"nats": -student.log_label_S.sum(), "tokens": count}
    if signal.selection != NO_ENTRIES:
        top_C, known_C = _teacher_top(signal)
        agreed = ((top_C == values_CV.argmax(1)) & known_C).sum()
        found |= {"agreed": agreed.to(count), "ranked": known_C.sum().to(count)}
    if _has_kl(signal):
        found |= {"kl": ForwardKL().terms(student, signal).sum(), "kl_tokens": count}
    if _is_exact(signal):
        found |= {"accepted": _acceptance(student, signal).sum(), "exact": count}
    return torch.stack([found.get(name, none) for name in _TOTALS])


def _calibration(student: Student, values_CV: Tensor, labels_C: Tensor) -> Tensor:
    """float [45]: by confidence, how many first guesses, their confidence, how many right."""
    top, guess = values_CV.max(1)
    confidence = (top - student.read.lse_S).exp()
    # NaN has no bin, and as an integer may be any number.
    bins = (confidence * CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)
    each = torch.stack([torch.ones_like(top), confidence, (guess == labels_C).to(top)])
    return top.new_zeros(3, CALIBRATION_BINS).index_add_(1, bins, each).flatten()


def _is_exact(signal: TorchSignal) -> bool:
    """Whether the entries have the teacher's own probabilities."""
    return signal.selection != NO_ENTRIES and not is_sampled(signal.selection)


def _has_kl(signal: TorchSignal) -> bool:
    """Whether KL can be told: of a draw by the entropy that is stored, unless it was tempered."""
    drawn = is_sampled(signal.selection) and "temperature=" not in signal.selection
    return _is_exact(signal) or (drawn and "entropy" in signal.scalars)


def _teacher_top(signal: TorchSignal) -> tuple[Tensor, Tensor]:
    """int64 and bool [S]: the teacher's most likely token, and whether it is known.

    The largest entry; of a draw with two that are alike, neither is known to be it. ``counts`` say
    how often a token was drawn, which is not enough.
    """
    rows = len(signal)
    largest_S = signal.logprobs_N.new_full((rows,), -torch.inf)
    largest_S = largest_S.scatter_reduce(0, signal.rows_N, signal.logprobs_N, "amax")
    is_top_N = signal.logprobs_N == largest_S[signal.rows_N]
    tops_S = segment_sum(is_top_N.float(), signal.rows_N, rows=rows)
    top_S = signal.ids_N.new_full((rows,), -1)
    top_S = top_S.scatter_reduce(0, signal.rows_N[is_top_N], signal.ids_N[is_top_N], "amax")
    if signal.selection.startswith("counts"):
        return top_S, torch.zeros_like(tops_S, dtype=torch.bool)
    return top_S, tops_S == 1 if is_sampled(signal.selection) else tops_S > 0


def _acceptance(student: Student, signal: TorchSignal) -> Tensor:
    """[S]: Σ min(s, t), what is outside the entries as one token."""
    log_s_N = student.log_s_N
    both_N = torch.minimum(signal.logprobs_N.to(log_s_N), log_s_N).exp()
    outside_S = torch.minimum(signal.rest_S.to(log_s_N), student.log_outside_S).exp()
    return segment_sum(both_N, signal.rows_N, rows=len(signal)) + outside_S
