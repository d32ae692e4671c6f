"""Samples to batches: padded rows or one packed row, with the signal's rows already shifted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdstore.errors import UsageError
from kdstore.readers.dataset import PlannedSamples
from kdstore.readers.weights import TokenWeights
from kdstore.sample import Sample
from kdstore.signal import SparseSignal, TorchSignal

IGNORED_LABEL = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples as tensors. ``logits.view(-1, V)[logit_rows_S]`` answers ``signal``.

    * ``input_ids``, ``position_ids`` int64 [B, L]: a sample a row, padded; or, packed, [P, L]: some
      samples a row, positions start again at each
    * ``attention_mask`` int64 [B, L]; None if packed
    * ``cu_seqlens`` int32: where samples begin in the row of all their tokens, and its end. Packed,
      these are the tokens of ``input_ids.view(-1)``, and the padding of a row counts as samples
    * ``labels`` int64 like ``input_ids``: the token at scored positions, else -100; not shifted
    * ``signal``: the S scored positions, sample after sample; ``logit_rows_S`` int64
    * ``weights_S`` float32: token weights, one each unless set
    * ``longest``: tokens of the longest sample
    * ``cursor``: the loader's state after this batch
    * ``is_filler``: nothing is scored, so that a rank may step that has no batch left
    * ``teachers``: of joined stores, what the others said; see ``of_teacher``
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    cu_seqlens: Tensor
    labels: Tensor
    signal: TorchSignal
    logit_rows_S: Tensor
    weights_S: Tensor
    sample_ids: list[str]
    longest: int
    cursor: Any = None
    is_filler: bool = False
    teachers: Mapping[str, Answers] = field(default_factory=dict)

    def model_inputs(self, *, varlen: bool = False) -> dict[str, Any]:
        """What a transformers model takes; packed samples do not see each other.

        ``varlen`` is for attention that is told of packed samples by their lengths, flash attention
        and ``varlen_sdpa``: all rows become one, beside where samples begin and the longest's
        length. No cache: with one, transformers does not look for the samples of a packed row, and
        they would attend to each other.
        """
        inputs: dict[str, Any] = {"use_cache": False}
        if self.attention_mask is not None:
            return {**inputs, "input_ids": self.input_ids, "attention_mask": self.attention_mask}
        rows = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        if not varlen:
            return {**inputs, **rows}
        one_row = {name: ids.view(1, -1) for name, ids in rows.items()}
        return {**inputs, **one_row, **varlen_inputs(self.cu_seqlens, longest=self.longest)}

    def of_teacher(self, name: str) -> Batch:
        """The same batch with another teacher's answers; KeyError if there is none."""
        answers = self.teachers[name]
        return replace(self, **{one.name: getattr(answers, one.name) for one in fields(answers)})

    def to(self, device: str | torch.device) -> Batch:
        """The same batch on a device."""
        teachers = {name: answers.to(device) for name, answers in self.teachers.items()}
        return replace(_moved(self, device), teachers=teachers)

    def pin_memory(self) -> Batch:
        """The same batch; torch's DataLoader calls this, and the signal stays pageable."""
        pinned: dict[str, Any] = {
            one.name: value.pin_memory()
            for one in fields(self)
            if isinstance(value := getattr(self, one.name), Tensor)
        }
        return replace(self, **pinned)


def varlen_inputs(starts: Tensor, *, longest: int) -> dict[str, Any]:
    """How transformers tells attention where the samples of a row begin, and its end."""
    names = {"cu_seq_lens": starts, "max_length": longest}
    return {f"{name}_{of}": value for name, value in names.items() for of in ("q", "k")}


@dataclass(frozen=True, eq=False)
class Answers:
    """What another teacher said of a batch: the fields of a Batch that differ by teacher."""

    labels: Tensor
    signal: TorchSignal
    logit_rows_S: Tensor
    weights_S: Tensor

    def to(self, device: str | torch.device) -> Answers:
        """The same on a device."""
        return _moved(self, device)


B = TypeVar("B", Batch, Answers)


def _moved(tensors: B, device: str | torch.device) -> B:
    moved: dict[str, Any] = {
        one.name: value.to(device)
        for one in fields(tensors)
        if isinstance(value := getattr(tensors, one.name), Tensor | TorchSignal)
    }
    return replace(tensors, **moved)


@dataclass(frozen=True)
class Collator:
    """Makes a Batch of samples that carry signals: ``collate_fn`` of a torch DataLoader.

    ``pack`` puts samples in one row without padding; or in rows of ``max_length`` tokens, as a
    loader's plan packs them, else all in one. Without ``pack`` each has a row, padded on the right
    with ``pad_id``. The mask comes from lengths, never from token ids, so a pad that equals the
    end-of-sequence token masks nothing. ``weights`` says how much each position counts.
    """

    pack: bool = False
    pad_id: int = 0
    max_length: int | None = None
    weights: TokenWeights | None = None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch of one or more samples; UsageError for none, or one without a signal."""
        plan = samples.plan if isinstance(samples, PlannedSamples) else None
        _expect_some(samples)
        lengths = np.array([sample.num_tokens for sample in samples], dtype=np.int64)
        packs = np.array([len(samples)]) if plan is None else plan.packs
        rows = self._rows(lengths, packs if self.pack else np.ones_like(lengths))
        flat = {
            name: torch.from_numpy(array).view(-1, rows.width)
            for name, array in self._flat(samples, rows).items()
        }
        return Batch(
            input_ids=flat["input_ids"],
            position_ids=flat["position_ids"],
            attention_mask=None if self.pack else rows.mask(),
            cu_seqlens=torch.from_numpy(rows.starts(lengths, with_padding=self.pack)),
            sample_ids=[sample.sample_id for sample in samples],
            longest=rows.longest,
            cursor=None if plan is None else plan.cursor,
            is_filler=plan is not None and plan.is_filler,
            **vars(self._answers(samples, rows, flat["input_ids"])),
            teachers={
                name: self._answers([s.teachers[name] for s in samples], rows, flat["input_ids"])
                for name in samples[0].teachers
            },
        )

    def _answers(self, samples: Sequence[Sample], rows: _Rows, input_ids: Tensor) -> Answers:
        """What one teacher said of a batch's tokens, and where."""
        signal = SparseSignal.concat([_signal_of(sample) for sample in samples])
        token_rows_S = torch.from_numpy(_shifted([s.positions_S for s in samples], rows.offsets))
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        labels.view(-1)[token_rows_S] = input_ids.view(-1)[token_rows_S]
        weights_S = torch.ones(len(signal))
        if self.weights is not None and len(signal):
            weights_S = torch.from_numpy(np.concatenate([self.weights(s) for s in samples]))
        return Answers(labels, signal.to_torch(), token_rows_S - 1, weights_S)

    def _rows(self, lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> _Rows:
        """Where samples of these lengths lie, so many of them in each row."""
        row_of = np.repeat(np.arange(len(counts)), counts)
        ends = np.cumsum(lengths)
        used = np.bincount(row_of, lengths, minlength=len(counts)).astype(np.int64)
        width = int(used.max(initial=0))
        if self.pack and self.max_length is not None:
            width = max(width, self.max_length)
        begins = np.cumsum(used) - used
        offsets = ends - lengths - begins[row_of] + row_of * width
        return _Rows(width, int(lengths.max()), offsets, used)

    def _flat(self, samples: Sequence[Sample], rows: _Rows) -> dict[str, NDArray[np.int64]]:
        size = rows.width * len(rows.used)
        input_ids = np.full(size, self.pad_id, dtype=np.int64)
        position_ids = np.zeros(size, dtype=np.int64)
        for sample, offset in zip(samples, rows.offsets.tolist(), strict=True):
            place = slice(offset, offset + sample.num_tokens)
            input_ids[place] = sample.input_ids_T
            position_ids[place] = np.arange(sample.num_tokens)
        for end, used in enumerate(rows.used.tolist(), start=1) if self.pack else []:
            padding = np.arange(rows.width - used) % rows.longest
            position_ids[(end - 1) * rows.width + used : end * rows.width] = padding
        return {"input_ids": input_ids, "position_ids": position_ids}


@dataclass(frozen=True)
class _Rows:
    """Rows of ``width`` tokens: ``used`` [P] of each, and where samples begin, ``offsets`` [B].

    The padding of packed rows counts as samples, none longer than the ``longest`` real one, so
    that a student whose context is shorter than a row can take it.
    """

    width: int
    longest: int
    offsets: NDArray[np.int64]
    used: NDArray[np.int64]

    def mask(self) -> Tensor:
        """int64 [P, width]: 1 where a token is, 0 where a row is padded."""
        return torch.from_numpy((np.arange(self.width) < self.used[:, None]).astype(np.int64))

    def starts(self, lengths: NDArray[np.int64], *, with_padding: bool) -> NDArray[np.int32]:
        """Where samples begin in the row of all tokens, the padding a sample of each row or not."""
        if not with_padding:
            return np.cumsum([0, *lengths.tolist()]).astype(np.int32)
        rows = np.arange(len(self.used)) * self.width
        padding = [
            np.arange(row + used, row + self.width, self.longest)
            for row, used in zip(rows.tolist(), self.used.tolist(), strict=True)
        ]
        last = [len(self.used) * self.width]
        return np.unique(np.concatenate([self.offsets, *padding, last])).astype(np.int32)


def _shifted(
    positions: Sequence[NDArray[np.int64]], offsets: NDArray[np.int64]
) -> NDArray[np.int64]:
    pairs = zip(positions, offsets, strict=True)
    return np.concatenate([position + offset for position, offset in pairs])


def _expect_some(samples: Sequence[Sample]) -> None:
    if not samples:
        raise UsageError("a batch needs samples", expected="at least one", got=0)


def _signal_of(sample: Sample) -> SparseSignal:
    if sample.signal is None or len(sample.signal) != sample.num_scored:
        raise UsageError(
            "a sample without its signal cannot be trained on",
            where=f"sample {sample.sample_id!r}",
            expected=f"a signal of {sample.num_scored} positions",
            got=None if sample.signal is None else len(sample.signal),
            todo="read samples from a store that kdstore.open gave",
        )
    return sample.signal
