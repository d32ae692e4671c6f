"""TokenWeights: by kind of span, by scalars, in batches, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdstore import Collator, Sample, Span, SparseSignal, TokenWeights
from kdstore.errors import UsageError

SPANS = (
    Span(0, 2, "user", supervised=False),
    Span(2, 6, "assistant", supervised=True),
    Span(4, 5, "reasoning", supervised=True),
)


def make_sample(name: str = "one") -> Sample:
    """Five scored positions: one of the user's, two and one of the assistant's, one reasoned."""
    scalars = {"entropy": [0.0, 0.5, 1.0, 2.0, 9.0], "label_logprob": [-4.0, -3.0, -2.0, -1.0, 0.0]}
    signal = SparseSignal.from_arrays(
        "topk:k=1", range(6), np.zeros(5), np.zeros(5), scalars=scalars
    )
    return Sample(name, np.zeros(6, np.int32), spans=SPANS, runs=((1, 6),), signal=signal)


def test_by_kind():
    weights = TokenWeights(kinds={"assistant": 0.5, "reasoning": 2.0})
    assert weights(make_sample()).tolist() == [1.0, 0.5, 0.5, 2.0, 0.5]
    assert weights(make_sample()).dtype == np.float32


def test_by_scalars():
    """Straight lines between the points, level beyond them; the product of all that is set."""
    by_entropy = TokenWeights(entropy=[[0.5, 0.0], [1.0, 1.0], [2.0, 3.0]])
    assert by_entropy(make_sample()).tolist() == [0.0, 0.0, 1.0, 3.0, 3.0]
    both = TokenWeights(entropy=[[0.0, 2.0]], label_logprob=[[-4.0, 1.0], [0.0, 0.0]])
    assert both(make_sample()).tolist() == [2.0, 1.5, 1.0, 0.5, 0.0]


def test_in_a_batch():
    samples = [make_sample("a"), make_sample("b")]
    batch = Collator(weights=TokenWeights(kinds={"user": 0.0}))(samples)
    assert batch.weights_S.dtype == torch.float32
    assert batch.weights_S.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0] * 2
    empty = make_sample().at(np.zeros(5, dtype=np.bool_))
    assert Collator(weights=TokenWeights())([empty]).weights_S.tolist() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": {"user": -1.0}}, "zero or more"),
        ({"kinds": {"user": float("nan")}}, "zero or more"),
        ({"entropy": []}, "a list of points"),
        ({"entropy": [[1.0]]}, "a list of points"),
        ({"entropy": [[1.0, 0.0], [0.0, 1.0]]}, "ascending"),
        ({"label_logprob": [[-np.inf, 0.0], [0.0, 1.0]]}, "finite"),
        ({"label_logprob": [[1.0, -2.0]]}, "zero or more"),
    ],
)
def test_what_is_no_weight_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        TokenWeights(**options)


def test_missing_scalars_are_named():
    bare = SparseSignal.from_arrays("topk:k=1", [0, 1], [0], [0.0])
    sample = Sample("bare", np.zeros(2, np.int32), runs=((1, 2),), signal=bare)
    with pytest.raises(UsageError, match=r"told apart by entropy(.|\n)*'bare'(.|\n)*no scalars"):
        TokenWeights(entropy=[[0.0, 1.0]])(sample)
