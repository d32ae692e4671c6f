"""docs/format.md is enough to read a store: a reader made from it alone agrees with ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kdstore
from tests.independent_reader import Reader

SPECS = (
    "pps:tau=0.06",
    "pps:tau=0.5",
    "pps:tau=0.003",
    "counts:n=50",
    "topk:k=50",
    "topp:p=0.95,max_k=300",
    "full",
)


@pytest.mark.parametrize("spec", SPECS)
def test_a_reader_made_from_the_document_agrees(dump: Callable[..., Path], spec: str) -> None:
    store = dump("store", select=spec)
    ours, reader = kdstore.open(store), Reader(store)
    theirs = list(reader)
    assert len(theirs) == len(ours) == 60
    assert any(reader.successors)
    for index, row in enumerate(theirs):
        sample = ours[index]
        assert sample.signal is not None
        assert row["sample_id"] == sample.sample_id
        np.testing.assert_array_equal(row["positions"], sample.positions_S)
        np.testing.assert_array_equal(row["indptr"], sample.signal.indptr)
        np.testing.assert_array_equal(row["ids"], sample.signal.ids_N)
        np.testing.assert_allclose(row["logprobs"], sample.signal.logprobs_N, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(row["rest"], sample.signal.rest_S, rtol=1e-6)
        if sample.signal.tail_N is not None:
            np.testing.assert_array_equal(row["tail"], sample.signal.tail_N)
        for name, values in sample.signal.scalars.items():
            np.testing.assert_allclose(row["scalars"][name], values, rtol=1e-6)
