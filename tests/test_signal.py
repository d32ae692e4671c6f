"""SparseSignal: views of the same arrays, and arrays that contradict each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdstore.errors import SignalError
from kdstore.signal import SparseSignal


def make_signal() -> SparseSignal:
    """Three positions with two, no and three entries."""
    return SparseSignal.from_arrays(
        "pps:tau=0.5",
        [0, 2, 2, 5],
        [1, 4, 0, 2, 3],
        np.log([0.5, 0.25, 0.1, 0.2, 0.3]),
        rest_S=np.log([0.25, 1.0, 0.4]),
        tail_N=[False, True, True, False, True],
        scalars={"entropy": [1.0, 2.0, 3.0]},
    )


def test_dense_and_kept_mass() -> None:
    signal = make_signal()
    want = np.array([[0, 0.5, 0, 0, 0.25], [0] * 5, [0.1, 0, 0.2, 0.3, 0]])
    np.testing.assert_allclose(signal.to_dense(5), want, rtol=1e-6)
    np.testing.assert_allclose(signal.kept_mass_S, want.sum(1), rtol=1e-6)
    assert signal.tail_counts_S.tolist() == [1, 0, 2]
    with pytest.raises(SignalError, match="below 4"):
        signal.to_dense(4)


def test_padded_never_drops() -> None:
    ids, logprobs = make_signal().padded(3)
    assert ids.tolist() == [[1, 4, -1], [-1, -1, -1], [0, 2, 3]]
    assert logprobs[1].tolist() == [-np.inf] * 3
    with pytest.raises(SignalError, match="padded\\(3\\)"):
        make_signal().padded(2)


@pytest.mark.parametrize(
    ("rows", "picked"),
    [
        (slice(1, None), [1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        (np.array([2, 0, 2]), [2, 0, 2]),
        (np.array([True, False, True]), [0, 2]),
        (slice(0, 0), []),
    ],
)
def test_slicing_picks_positions(rows: slice | np.ndarray, picked: list[int]) -> None:
    signal = make_signal()
    part = signal[rows]
    np.testing.assert_array_equal(part.to_dense(5), signal.to_dense(5)[picked])
    np.testing.assert_array_equal(part.rest_S, signal.rest_S[picked])
    np.testing.assert_array_equal(part.scalars["entropy"], signal.scalars["entropy"][picked])
    np.testing.assert_array_equal(part.tail_counts_S, signal.tail_counts_S[picked])


def test_concat_is_the_inverse_of_slicing() -> None:
    signal = make_signal()
    whole = SparseSignal.concat([signal[:1], SparseSignal.empty("pps:tau=0.5"), signal[1:]])
    for name in ("indptr", "ids_N", "logprobs_N", "rest_S", "tail_N"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(signal, name))


def test_concat_of_different_kinds_is_refused() -> None:
    other = SparseSignal.from_arrays("topk:k=1", [0, 1], [0], [0.0])
    with pytest.raises(SignalError, match="topk"):
        SparseSignal.concat([make_signal(), other])
    with pytest.raises(SignalError):
        SparseSignal.concat([])


def test_to_torch() -> None:
    tensors = make_signal().to_torch()
    assert tensors.rows_N.tolist() == [0, 0, 2, 2, 2]
    assert tensors.ids_N.dtype == torch.int64
    assert len(tensors) == 3
    assert tensors.to("cpu").scalars["entropy"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "arrays",
    [
        {"indptr": [0, 2]},
        {"indptr": [1, 3]},
        {"indptr": [0, 3, 2, 3]},
        {"indptr": []},
        {"logprobs_N": [0.0]},
        {"rest_S": [0.0, 0.0]},
        {"tail_N": [True]},
        {"scalars": {"entropy": [0.0, 1.0]}},
    ],
)
def test_arrays_that_contradict_each_other(arrays: dict[str, object]) -> None:
    good = {"indptr": [0, 3], "ids_N": [1, 2, 3], "logprobs_N": np.log([0.2, 0.3, 0.5])}
    with pytest.raises((SignalError, ValueError)):
        SparseSignal.from_arrays("full", **{**good, **arrays})  # type: ignore[arg-type]
