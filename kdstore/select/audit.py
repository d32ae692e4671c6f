"""A selection's signal and the audit's, from the same logits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kdstore.audit import AUDIT_SELECTION, audited_rows
from kdstore.hashing import RowKeys
from kdstore.select.base import Selection, SelectionStats
from kdstore.select.driver import DEFAULT_SCALARS, select
from kdstore.select.registry import parse_selection
from kdstore.signal import SparseSignal


def select_with_audit(
    logits_SV: Tensor,
    labels_S: Tensor,
    *,
    selection: Selection,
    keys: RowKeys,
    audit_fraction: float,
    scalars: Iterable[str] = DEFAULT_SCALARS,
    num_ids: int | None = None,
    stats: SelectionStats | None = None,
) -> tuple[SparseSignal, SparseSignal]:
    """What ``select`` gives, and the ``full`` signal without scalars of the audited positions.

    Arguments and errors are those of ``select``.
    """
    signal = select(
        logits_SV,
        labels_S,
        selection=selection,
        keys=keys,
        scalars=scalars,
        num_ids=num_ids,
        stats=stats,
    )
    rows = audited_rows(keys, fraction=audit_fraction)
    on_device = torch.from_numpy(rows).to(logits_SV.device)
    audit = select(
        logits_SV[on_device],
        labels_S[on_device],
        selection=parse_selection(AUDIT_SELECTION),
        keys=keys[rows],
        scalars=(),
        num_ids=num_ids,
    )
    return signal, audit
