"""Comparing signals of two teachers."""

from __future__ import annotations

import numpy as np
import pytest

from kdstore.signal import SparseSignal

# Importing vLLM imports parts of torch that torch itself calls deprecated.
IGNORED_WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def assert_same_signal(found: SparseSignal, expected: SparseSignal) -> None:
    """Equal in every array, bit for bit."""
    assert len(found) == len(expected)
    if not len(found):
        return
    for name in ("indptr", "ids_N", "logprobs_N", "rest_S", "counts_N", "tail_N"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    assert found.scalars.keys() == expected.scalars.keys()
    for name, values in found.scalars.items():
        np.testing.assert_array_equal(values, expected.scalars[name], name)


def same_ids(found: SparseSignal, expected: SparseSignal) -> float:
    """The share of positions whose entries have the same ids."""
    same = [
        np.array_equal(
            found.ids_N[found.indptr[row] : found.indptr[row + 1]],
            expected.ids_N[expected.indptr[row] : expected.indptr[row + 1]],
        )
        for row in range(len(found))
    ]
    return float(np.mean(same))
