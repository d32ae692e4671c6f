"""evaluate_model against cross-entropy computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdstore.errors import UsageError
from kdstore.sample import Sample
from kdstore.signal import SparseSignal
from kdstore.train.evaluate import (
    _NUM_SUMS,
    evaluate_model,
    evaluation_sums,
    metrics_of_sums,
)
from kdstore.train.head import DistillHead
from tests.train.train_helpers import (
    V,
    full_signal,
    log_softmax,
    sample_of,
    tiny_model,
    topk_signal,
)

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
    whole = evaluation_sums(model, SAMPLES, batch_size=1)
    parts = [
        evaluation_sums(model, SAMPLES, batch_size=1, rank=rank, world_size=world_size)
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
        evaluation_sums(model, SAMPLES, batch_size=1, rank=rank, world_size=3)
    assert [model.calls for model in models] == [2, 2, 2]


def test_training_mode_is_restored():
    model = tiny_model().train()
    evaluate_model(model, SAMPLES)
    assert model.training


def test_nothing_scored_is_refused():
    with pytest.raises(UsageError, match="no position of the held-out samples is scored"):
        evaluate_model(tiny_model(), SAMPLES[4:])


def test_a_hopeless_model_has_infinite_perplexity():
    sums = torch.zeros(_NUM_SUMS)
    sums[:2] = torch.tensor([9000.0, 1.0])
    assert metrics_of_sums(sums)["perplexity"] == math.inf


def with_signal(sample: Sample, kind: str) -> Sample:
    """The sample with a signal of a random teacher."""
    rng = np.random.default_rng(len(sample.sample_id))
    teacher = 2 * rng.normal(size=(sample.num_scored, V))
    made = {
        "topk": lambda: topk_signal(teacher, 3),
        "full": lambda: full_signal(teacher),
        "pps": lambda: replace(full_signal(teacher), selection="pps:tau=0.06"),
        "counts": lambda: replace(full_signal(teacher), selection="counts:n=50"),
    }
    return replace(sample, signal=made[kind]())


def by_hand(model, samples: list[Sample], kind: str) -> dict[str, float]:
    """The metrics from dense float64 rows, one position at a time."""
    found, hits = {"kl": [], "top1_agreement": [], "acceptance": []}, []
    for sample in samples:
        teacher = 2 * np.random.default_rng(len(sample.sample_id)).normal(
            size=(sample.num_scored, V)
        )
        tokens = torch.from_numpy(sample.input_ids_T[None].astype(np.int64))
        with torch.no_grad():
            logs = log_softmax(model(input_ids=tokens).logits[0].numpy())
        for row, t in zip(log_softmax(teacher), sample.positions_S, strict=True):
            s, p = np.exp(logs[t - 1]), np.exp(row)
            keep = np.argsort(-p)[: 3 if kind == "topk" else V]
            p = np.append(p[keep], 1 - p[keep].sum() if kind == "topk" else 1e-300)
            q = np.append(s[keep], 1 - s[keep].sum() if kind == "topk" else 1e-300)
            found["kl"].append((p * np.log(p / q)).sum())
            found["acceptance"].append(np.minimum(p, q).sum())
            found["top1_agreement"].append(row.argmax() == s.argmax())
            hits.append((s.max(), s.argmax() == sample.input_ids_T[t]))
    confidence, right = np.array(hits, dtype=float).T
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((confidence - right)[bins == b].sum()) for b in range(15)]
    return {"ece": sum(gaps) / len(bins)} | {name: np.mean(v) for name, v in found.items()}


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "head"])
@pytest.mark.parametrize("kind", ["topk", "full", "pps", "counts"])
def test_agreement_with_the_teacher(kind, fused):
    """Also a block of rows at a time, from hidden states; what a draw cannot tell is left out."""
    model, samples = tiny_model(), [with_signal(sample, kind) for sample in SAMPLES]
    expected = by_hand(model, samples, kind)
    if kind in ("pps", "counts"):
        del expected["acceptance"]
    if kind == "counts":
        del expected["top1_agreement"]
    if fused:
        DistillHead.attach(model)
    metrics = evaluate_model(model, samples)
    assert metrics.keys() - {"loss", "perplexity", "num_tokens"} == expected.keys()
    for name, value in expected.items():
        rounding = 0.01 if name == "kl" else 1e-5  # a draw's KL is by an entropy to 0.02
        assert metrics[name] == pytest.approx(value, abs=rounding), name


def test_a_draw_without_a_head_has_no_known_top():
    """Entries that share the tail's weight are alike: which the teacher prefers is not known."""
    signal = SparseSignal.from_arrays(
        "pps:tau=0.5", [0, 2, 4], [1, 2, 3, 4], np.log([0.5, 0.5, 0.9, 0.1])
    )
    sample = Sample("one", np.zeros(3, np.int32), runs=((1, 3),), signal=signal)
    model = tiny_model()
    sums = evaluation_sums(model, [sample], batch_size=1)
    assert sums[5] == 1
    assert "kl" not in metrics_of_sums(sums)  # no entropy is stored


def test_a_model_that_diverged_has_no_metrics():
    """They are NaN; confidences of NaN fall in no bin, and outside of all on some devices."""
    model = tiny_model()
    model.lm_head.weight.data.fill_(math.nan)
    metrics = evaluate_model(model, SAMPLES)
    assert metrics["num_tokens"] == 17
    assert math.isnan(metrics["loss"])
    assert math.isnan(metrics["ece"])


def test_rows_that_are_not_the_batch_are_refused():
    """A model that puts tokens before each row: no position is where it was."""

    class Prompted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model()

        def forward(self, input_ids, **inputs):
            return self.model(input_ids=torch.cat([input_ids, input_ids], 1))

    with pytest.raises(UsageError, match="one answer to each token"):
        evaluate_model(Prompted(), SAMPLES)


def test_samples_of_several_kinds():
    """Each is compared with what it has; cross-entropy is over all of them."""
    model = tiny_model()
    bare = [replace(sample, signal=None) for sample in SAMPLES[2:]]
    mixed = [*(with_signal(sample, "topk") for sample in SAMPLES[:2]), *bare]
    metrics = evaluate_model(model, mixed)
    assert metrics["loss"] == pytest.approx(evaluate_model(model, SAMPLES)["loss"], abs=1e-6)
    assert metrics["kl"] == pytest.approx(evaluate_model(model, mixed[:2])["kl"], abs=1e-6)
