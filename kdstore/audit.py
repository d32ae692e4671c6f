"""The audit: scored positions whose full distribution is kept, to measure the stored signal by.

Which ones is a keyed hash of seed, sample and position, so every worker and every resume agrees.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kdstore.hashing import Purpose, RowKeys
from kdstore.sample import Sample, merge_ranges

AUDIT_SELECTION = "full"


def audited_rows(keys: RowKeys, *, fraction: float) -> NDArray[np.int64]:
    """int64 [A], ascending: which of the S positions of ``keys`` are audited, in any draw."""
    if fraction <= 0:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(replace(keys, draw=0).uniform(Purpose.AUDIT)[:, 0] < fraction)


def audit_runs(sample: Sample, *, fraction: float, seed: int) -> tuple[tuple[int, int], ...]:
    """The audited positions of a sample as half-open ascending ranges."""
    positions = sample.positions_S
    keys = RowKeys.of_samples([(sample.sample_id, positions)], seed=seed)
    rows = audited_rows(keys, fraction=fraction)
    return merge_ranges([(position, position + 1) for position in positions[rows].tolist()])
