"""The ``hf`` teacher: a transformers causal LM on any torch device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kdstore.audit import audited_rows
from kdstore.completion import Completion, Prompt, Sampling
from kdstore.errors import TeacherError
from kdstore.hashing import RowKeys
from kdstore.sample import Sample
from kdstore.select import DEFAULT_SCALARS, Selection, SelectionStats, select_with_audit
from kdstore.select.driver import head_rows
from kdstore.signal import SparseSignal
from kdstore.teacher import Score
from kdstore.teachers.hf_generate import complete
from kdstore.teachers.hf_head import SplitModel
from kdstore.teachers.hf_load import CheckpointInfo, load_model

T = TypeVar("T")


class HFTeacher:
    """Scores samples in batches of similar length, at most ``batch_tokens`` tokens with padding.

    ``num_ids`` is how many ids the tokenizer has; logits beyond are vocabulary padding. Raises
    TeacherError if the model's logits are not as wide as its config says.
    """

    def __init__(
        self,
        info: CheckpointInfo,
        *,
        device: str,
        batch_tokens: int = 16_384,
        num_ids: int | None = None,
    ) -> None:
        self.info, self.batch_tokens = info, batch_tokens
        self.vocab_size = info.vocab_size
        self.num_ids = min(num_ids or info.vocab_size, info.vocab_size)
        self.stats = SelectionStats()
        self._split = SplitModel(load_model(info, device=device))
        self._check_width()

    def score(
        self,
        samples: Sequence[Sample],
        selection: Selection,
        *,
        scalars: Sequence[str] = DEFAULT_SCALARS,
        seed: int = 0,
        draw: int = 0,
        audit_fraction: float = 0.0,
    ) -> Iterator[Score]:
        """The score of each sample that has scored positions, longest first."""
        self.info.check_lengths(samples)
        batches = length_batches(
            samples, batch_tokens=self.batch_tokens, mix_lengths=self.info.mixes_lengths
        )
        for batch in batches:
            positions = [(sample.sample_id, sample.positions_S) for sample in batch]
            keys = RowKeys.of_samples(positions, seed=seed, draw=draw)
            signal, audit = self._score_batch(
                batch, selection, tuple(scalars), keys, audit_fraction=audit_fraction
            )
            rows = np.cumsum([0, *(sample.num_scored for sample in batch)])
            audited = np.searchsorted(audited_rows(keys, fraction=audit_fraction), rows)
            for sample, (start, end), (first, last) in zip(
                batch, pairwise(rows), pairwise(audited), strict=True
            ):
                yield Score(sample.sample_id, signal[start:end], audit[first:last])

    def close(self) -> None:
        """Nothing: the model is this process's."""

    def generate(
        self, groups: Iterable[Sequence[Prompt]], sampling: Sampling
    ) -> Iterator[Completion]:
        """One completion of each prompt, by batches of prompts of a group that end together.

        Of a batch, prompts and what they may become are at most ``batch_tokens`` tokens.
        """
        for group in groups:
            for room in sorted({prompt.max_tokens for prompt in group}, reverse=True):
                for batch in batches_by_length(
                    [prompt for prompt in group if prompt.max_tokens == room],
                    length=lambda prompt: prompt.num_tokens + prompt.max_tokens,
                    batch_tokens=self.batch_tokens,
                    mix_lengths=self.info.mixes_lengths,
                ):
                    yield from complete(self._split.model, batch, sampling, num_ids=self.num_ids)

    def provenance(self) -> dict[str, Any]:
        """Device, versions and the mean probability of vocabulary padding since the last call."""
        import transformers

        stats, self.stats = self.stats, SelectionStats()
        return {
            "backend": "hf",
            "device": str(self._split.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "padding_mass": stats.padding_mass / max(stats.num_positions, 1),
        }

    @torch.inference_mode()
    def _score_batch(
        self,
        batch: Sequence[Sample],
        selection: Selection,
        scalars: tuple[str, ...],
        keys: RowKeys,
        *,
        audit_fraction: float,
    ) -> tuple[SparseSignal, SparseSignal]:
        """The signal of all scored positions of a batch, and that of its audited ones."""
        device = self._split.device
        ids_BL, rows_S = padded_batch(batch)
        labels_S = ids_BL.view(-1)[rows_S + 1]
        hidden = self._split.hidden(ids_BL.to(device)).flatten(0, 1)[rows_S.to(device)]
        rows = head_rows(self.vocab_size, hidden.device)
        parts = []
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            parts.append(
                select_with_audit(
                    self._split.logits(hidden[chunk]),
                    labels_S[chunk].to(device),
                    selection=selection,
                    keys=keys[chunk],
                    audit_fraction=audit_fraction,
                    scalars=scalars,
                    num_ids=self.num_ids,
                    stats=self.stats,
                )
            )
        signals, audits = zip(*parts, strict=True)
        return SparseSignal.concat(signals), SparseSignal.concat(audits)

    @torch.inference_mode()
    def _check_width(self) -> None:
        probe = torch.zeros((1, 1), dtype=torch.long, device=self._split.device)
        width = self._split.logits(self._split.hidden(probe)[0]).shape[-1]
        if width != self.vocab_size:
            raise TeacherError(
                "the teacher's logits are not as wide as its config says",
                where=self.info.path,
                expected=f"vocab_size {self.vocab_size}",
                got=f"logits of width {width}",
                todo="correct vocab_size in the teacher's config.json",
            )


def length_batches(
    samples: Sequence[Sample], *, batch_tokens: int, mix_lengths: bool = True
) -> Iterator[list[Sample]]:
    """Samples with scored positions, by ``batches_by_length``."""
    return batches_by_length(
        [sample for sample in samples if sample.num_scored],
        length=lambda sample: sample.num_tokens,
        batch_tokens=batch_tokens,
        mix_lengths=mix_lengths,
    )


def batches_by_length(
    items: Sequence[T], *, length: Callable[[T], int], batch_tokens: int, mix_lengths: bool = True
) -> Iterator[list[T]]:
    """All items, longest first, in batches of bounded padded size.

    One longer than ``batch_tokens`` is a batch of its own. Without ``mix_lengths`` only equal
    lengths share a batch.
    """
    batch: list[T] = []
    for item in sorted(items, key=length, reverse=True):
        if batch and (
            length(batch[0]) * (len(batch) + 1) > batch_tokens
            or (not mix_lengths and length(batch[0]) != length(item))
        ):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def padded_batch(batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """``input_ids`` [B, L], padded on the right; the flat row of each scored position's logits."""
    width = max(sample.num_tokens for sample in batch)
    ids = np.zeros((len(batch), width), dtype=np.int64)
    rows = []
    for index, sample in enumerate(batch):
        ids[index, : sample.num_tokens] = sample.input_ids_T
        rows.append(index * width + sample.positions_S - 1)
    return torch.from_numpy(ids), torch.from_numpy(np.concatenate(rows))
