"""Samples to batches: padded rows or one packed row, with the signal's rows already shifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdstore.errors import UsageError
from kdstore.sample import Sample
from kdstore.signal import SparseSignal, TorchSignal

IGNORED_LABEL = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples as tensors. ``logits.view(-1, V)[logit_rows_S]`` answers ``signal``.

    * ``input_ids``, ``position_ids`` int64 [B, L] padded, or [1, T] packed, where positions start
      again at each sample
    * ``attention_mask`` int64 [B, L]; None if packed
    * ``cu_seqlens`` int32 [B+1]: where samples begin in the row of all their tokens
    * ``labels`` int64 like ``input_ids``: the token at scored positions, else -100; not shifted
    * ``signal``: the S scored positions, sample after sample; ``logit_rows_S`` int64
    * ``weights_S`` float32: token weights, one each unless set
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
    cursor: Any = None

    def model_inputs(self) -> dict[str, Any]:
        """What a transformers model takes; packed samples do not see each other.

        No cache: with one, transformers does not look for the samples of a packed row, and they
        would attend to each other.
        """
        if self.attention_mask is None:
            masking = {"position_ids": self.position_ids}
        else:
            masking = {"attention_mask": self.attention_mask}
        return {"input_ids": self.input_ids, **masking, "use_cache": False}

    def to(self, device: str | torch.device) -> Batch:
        """The same batch on a device."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | TorchSignal)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch; torch's DataLoader calls this, and the signal stays pageable."""
        pinned: dict[str, Any] = {
            field.name: value.pin_memory()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **pinned)


@dataclass(frozen=True)
class Collator:
    """Makes a Batch of samples that carry signals: ``collate_fn`` of a torch DataLoader.

    ``pack`` puts all samples in one row without padding; else rows are padded on the right with
    ``pad_id``. The mask comes from lengths, never from token ids, so a pad that equals the
    end-of-sequence token masks nothing.
    """

    pack: bool = False
    pad_id: int = 0

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch of one or more samples; UsageError for none, or one without a signal."""
        signal = SparseSignal.concat([_signal_of(sample) for sample in _some(samples)])
        lengths = np.array([sample.num_tokens for sample in samples], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        width = int(lengths.sum() if self.pack else lengths.max())
        offsets = starts if self.pack else np.arange(len(samples)) * width
        positions = [sample.positions_S for sample in samples]
        token_rows_S = _shifted(positions, offsets)
        flat = {
            name: torch.from_numpy(array).view(1 if self.pack else len(samples), width)
            for name, array in self._flat(samples, offsets, token_rows_S, width).items()
        }
        return Batch(
            input_ids=flat["input_ids"],
            position_ids=flat["position_ids"],
            attention_mask=None if self.pack else flat["attention_mask"],
            cu_seqlens=torch.from_numpy(np.append(starts, lengths.sum()).astype(np.int32)),
            labels=flat["labels"],
            signal=signal.to_torch(),
            logit_rows_S=torch.from_numpy(token_rows_S - 1),
            weights_S=torch.ones(len(signal)),
            sample_ids=[sample.sample_id for sample in samples],
        )

    def _flat(
        self,
        samples: Sequence[Sample],
        offsets: NDArray[np.int64],
        token_rows_S: NDArray[np.int64],
        width: int,
    ) -> dict[str, NDArray[np.int64]]:
        size = width if self.pack else width * len(samples)
        input_ids = np.full(size, self.pad_id, dtype=np.int64)
        position_ids, mask = np.zeros((2, size), dtype=np.int64)
        for sample, offset in zip(samples, offsets, strict=True):
            place = slice(offset, offset + sample.num_tokens)
            input_ids[place] = sample.input_ids_T
            position_ids[place] = np.arange(sample.num_tokens)
            mask[place] = 1
        labels = np.full(size, IGNORED_LABEL, dtype=np.int64)
        labels[token_rows_S] = input_ids[token_rows_S]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": mask,
            "labels": labels,
        }


def _shifted(
    positions: Sequence[NDArray[np.int64]], offsets: NDArray[np.int64]
) -> NDArray[np.int64]:
    pairs = zip(positions, offsets, strict=True)
    return np.concatenate([position + offset for position, offset in pairs])


def _some(samples: Sequence[Sample]) -> Sequence[Sample]:
    if not samples:
        raise UsageError("a batch needs samples", expected="at least one", got=0)
    return samples


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
