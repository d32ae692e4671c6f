"""evaluate_model against cross-entropy computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kdstore.errors import UsageError
from kdstore.sample import Sample
from kdstore.train.evaluate import evaluate_model, metrics_of_sums, nll_sums
from tests.train.train_helpers import log_softmax, sample_of, tiny_model

SAMPLES = [
    sample_of(9, ((1, 9),), seed=0, name="whole"),
    sample_of(4, ((2, 3),), seed=1, name="one token"),
    sample_of(12, ((1, 3), (7, 12)), seed=2, name="two runs"),
    sample_of(2, ((1, 2),), seed=3, name="short"),
    sample_of(5, (), seed=4, name="nothing scored"),
]


def nll_by_hand(model, sample: Sample) -> list[float]:
    """-log s of each scored token, one sample at a time, no padding, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(sample.input_ids_T[None].astype(np.int64))).logits
    logs = log_softmax(logits[0].numpy())
    return [-logs[t - 1, sample.input_ids_T[t]] for t in sample.positions_S]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_equals_hand_computed_cross_entropy(batch_size):
    model = tiny_model()
    nll = [value for sample in SAMPLES for value in nll_by_hand(model, sample)]
    metrics = evaluate_model(model, SAMPLES, batch_size)
    assert metrics["num_tokens"] == len(nll) == 8 + 1 + 7 + 1
    assert metrics["loss"] == pytest.approx(sum(nll) / len(nll), abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_batches(world_size):
    """Each counts its own; together they are the whole, also when batches do not divide."""
    model = tiny_model()
    whole = nll_sums(model, SAMPLES, batch_size=1)
    parts = [
        nll_sums(model, SAMPLES, batch_size=1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_ranks_run_the_model_equally_often():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.calls = tiny_model(), 0

        def forward(self, **inputs):
            self.calls += 1
            return self.model(**inputs)

    models = [Counting() for _ in range(3)]
    for rank, model in enumerate(models):
        nll_sums(model, SAMPLES, batch_size=1, rank=rank, world_size=3)
    assert [model.calls for model in models] == [2, 2, 2]


def test_training_mode_is_restored():
    model = tiny_model().train()
    evaluate_model(model, SAMPLES)
    assert model.training


def test_nothing_scored_is_refused():
    with pytest.raises(UsageError, match="no position of the held-out samples is scored"):
        evaluate_model(tiny_model(), SAMPLES[4:])


def test_a_hopeless_model_has_infinite_perplexity():
    assert metrics_of_sums(torch.tensor([9000.0, 1.0]))["perplexity"] == math.inf
