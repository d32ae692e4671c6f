"""Full logits in, SparseSignal out, a bounded chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from kdstore.errors import TeacherError
from kdstore.hashing import RowKeys
from kdstore.select.base import Entries, Selection, SelectionStats
from kdstore.select.distribution import BLOCK, Distribution, Scratch
from kdstore.select.scalars import compute_scalars
from kdstore.signal import SparseSignal

DEFAULT_SCALARS = ("label_logprob", "label_rank", "entropy")
CPU_CHUNK_ELEMENTS = 1 << 20  # any chunk costs a millisecond besides; 2^21 leaves the cache
GPU_CHUNK_ELEMENTS = 1 << 26
CPU_HEAD_ROWS = 64


@torch.no_grad()
def select(
    logits_SV: Tensor,
    labels_S: Tensor,
    *,
    selection: Selection,
    keys: RowKeys,
    scalars: Iterable[str] = DEFAULT_SCALARS,
    num_ids: int | None = None,
    stats: SelectionStats | None = None,
) -> SparseSignal:
    """The signal of S positions from their logits [S, V] in any float dtype, on any device.

    ``labels_S`` int64 are the tokens that the positions hold, ``keys`` their random numbers. Logits
    from ``num_ids`` on are vocabulary padding: they count as -inf, and ``stats`` gathers the mass
    they had. Raises TeacherError on NaN, on +inf and on rows without a finite logit.
    """
    rows = rows_per_chunk(logits_SV.shape[1], logits_SV.device)
    names = tuple(scalars)
    width = logits_SV[:, :num_ids].shape[1]
    scratch = Scratch.empty(min(rows, len(logits_SV)), width, logits_SV.device)
    parts = [
        _select_chunk(
            logits_SV[start : start + rows],
            labels_S[start : start + rows],
            selection=selection,
            keys=keys[start : start + rows],
            scalars=names,
            num_ids=num_ids,
            stats=stats,
            scratch=scratch,
        )
        for start in range(0, len(logits_SV), rows)
    ]
    if not parts:
        empty = {name: np.zeros(0, np.float32) for name in names}
        return SparseSignal.from_arrays(selection.spec, [0], [], [], scalars=empty)
    return SparseSignal.concat(parts)


def head_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits for a head to make at once: 256 MB of float32, on a CPU 8 MB or 64 rows.

    There, larger blocks are fresh memory each time, and fewer rows read the weights more often.
    """
    if device.type == "cpu":
        return max(CPU_HEAD_ROWS, 2 * CPU_CHUNK_ELEMENTS // vocab_size)
    return max(1, GPU_CHUNK_ELEMENTS // vocab_size)


def rows_per_chunk(vocab_size: int, device: torch.device) -> int:
    """Rows of logits to select from at once: 4 MB of float32 on a CPU, else 256 MB."""
    elements = CPU_CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS
    return max(1, elements // max(vocab_size, BLOCK))


def _select_chunk(
    logits_CV: Tensor,
    labels_C: Tensor,
    *,
    selection: Selection,
    keys: RowKeys,
    scalars: tuple[str, ...],
    num_ids: int | None,
    stats: SelectionStats | None,
    scratch: Scratch,
) -> SparseSignal:
    teacher = Distribution.of_logits(logits_CV[:, :num_ids], scratch)
    check_finite(teacher.lse_C, keys)
    if stats is not None:
        stats.num_positions += len(keys)
        stats.padding_mass += _padding_mass(logits_CV, num_ids, teacher.lse_C)
    described = selection.describes(teacher)
    values = compute_scalars(scalars, teacher, labels_C, described=described)
    return to_signal(selection, selection.entries(described, keys), values)


def check_finite(lse_C: Tensor, keys: RowKeys) -> None:
    """TeacherError, naming a position, if a row of logits has no log-sum-exp."""
    bad = ~torch.isfinite(lse_C)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise TeacherError(
            "the teacher gave logits that are no distribution",
            where=f"position {int(keys.position_S[row])} of a sample ({int(bad.sum())} rows)",
            expected="at least one finite logit, no NaN and no +inf",
            got=f"log-sum-exp {float(lse_C[row])}",
            todo="load the teacher in float32 or bfloat16 and check its weights",
        )


def _padding_mass(logits_CV: Tensor, num_ids: int | None, lse_C: Tensor) -> float:
    if num_ids is None or num_ids >= logits_CV.shape[1]:
        return 0.0
    return lost_mass(logits_CV[:, num_ids:].float().logsumexp(-1), lse_C)


def lost_mass(padding_C: Tensor, lse_C: Tensor) -> float:
    """Sum over rows of the probability of padding, from the log-sum-exp of it and of the rest."""
    return float(-torch.expm1(lse_C - torch.logaddexp(padding_C, lse_C)).sum())


def to_signal(selection: Selection, entries: Entries, scalars: dict[str, Tensor]) -> SparseSignal:
    """Entries and scalars float32 [C], on whatever device, as a signal."""
    lengths = torch.bincount(entries.rows_N, minlength=len(entries.rest_C)).cpu().numpy()
    return SparseSignal.from_arrays(
        selection.spec,
        np.concatenate([[0], np.cumsum(lengths)]),
        entries.ids_N.cpu().numpy(),
        entries.logprobs_N.cpu().numpy(),
        rest_S=entries.rest_C.cpu().numpy(),
        counts_N=None if entries.counts_N is None else entries.counts_N.cpu().numpy(),
        tail_N=None if entries.tail_N is None else entries.tail_N.cpu().numpy(),
        scalars={name: value.cpu().numpy() for name, value in scalars.items()},
    )
