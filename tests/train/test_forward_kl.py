"""forward_kl against dense float64 references, with the bugs of other projects in mind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdstore.errors import UsageError
from kdstore.readers.collate import Collator
from kdstore.signal import SparseSignal
from kdstore.train.losses import forward_kl, student
from tests.train.train_helpers import (
    V,
    entropy_S,
    full_signal,
    log_softmax,
    one_sample_batch,
    pps_signal,
    ragged_samples,
    tiny_model,
    topk_signal,
)

S = 7


@pytest.fixture(params=["one block", "blocks of two rows"], autouse=True)
def block_size(request, monkeypatch):
    """Every test holds whether the positions fit in one block or not."""
    if request.param != "one block":
        monkeypatch.setattr(student, "BLOCK_ELEMENTS", 2 * V)


def logits_pair(seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Teacher logits [S, V] and student logits [1, S + 1, V] that want a gradient, float64."""
    rng = np.random.default_rng(seed)
    student = torch.from_numpy(2 * rng.normal(size=(1, S + 1, V))).requires_grad_()
    return 2 * rng.normal(size=(S, V)), student


def value_and_grad(logits: torch.Tensor, batch, **options) -> tuple[float, np.ndarray]:
    """The loss and its gradient at the rows that the signal answers, [S, V]."""
    logits.grad = None
    loss = forward_kl(logits, batch, **options)
    loss.backward()
    grad = logits.grad.reshape(-1, V)
    assert not grad[len(batch.signal) :].any()
    return loss.item(), grad[: len(batch.signal)].double().numpy()


def dense_student(logits: torch.Tensor, rows: int = S) -> np.ndarray:
    """Dense float64 log s of the first rows."""
    return log_softmax(logits.detach().double().reshape(-1, V)[:rows].numpy())


def test_full_equals_dense_kl():
    """The stored entropy of a full signal is rounded; the loss must not use it."""
    teacher, logits = logits_pair()
    signal = full_signal(teacher)
    logt, logs = signal.logprobs_N.reshape(S, V).astype(np.float64), dense_student(logits)
    t = np.exp(logt)

    loss, grad = value_and_grad(logits, one_sample_batch(signal))

    assert loss == pytest.approx((t * (logt - logs)).sum() / S, abs=1e-6)
    expected = (t.sum(1, keepdims=True) * np.exp(logs) - t) / S
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_sampled_equals_dense_reference():
    """Value -entropy - Σ t̂ log s, gradient (Σt̂) s - t̂."""
    teacher, logits = logits_pair(1)
    signal = pps_signal(teacher, np.random.default_rng(5))
    t, logs = signal.to_dense(V), dense_student(logits)

    loss, grad = value_and_grad(logits, one_sample_batch(signal))

    entropy = entropy_S(log_softmax(teacher))
    assert loss == pytest.approx((-entropy - (t * logs).sum(1)).mean(), abs=1e-6)
    expected = (t.sum(1, keepdims=True) * np.exp(logs) - t) / S
    np.testing.assert_allclose(grad, expected, atol=1e-7)


def test_sampled_without_entropy_is_cross_entropy():
    teacher, logits = logits_pair(2)
    signal = replace(pps_signal(teacher, np.random.default_rng(5)), scalars={})
    expected = -(signal.to_dense(V) * dense_student(logits)).sum(1).mean()
    assert forward_kl(logits, one_sample_batch(signal)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3, V - 1, V])
def test_rest_equals_dense_reference(k):
    """The rest is one more outcome, answered by the student's mass outside the entries."""
    teacher, logits = logits_pair(3)
    signal = topk_signal(teacher, k)
    t, logs = signal.to_dense(V), dense_student(logits)
    keep = t > 0
    rest = np.exp(signal.rest_S.astype(np.float64))
    outside = np.where(keep, 0.0, np.exp(logs))
    s_rest = outside.sum(1)

    loss, grad = value_and_grad(logits, one_sample_batch(signal))

    value = np.where(keep, t * (np.log(np.where(keep, t, 1)) - logs), 0).sum(1)
    if k < V:
        value += rest * (np.log(rest) - np.log(s_rest))
    assert loss == pytest.approx(value.mean(), abs=1e-6)
    total = (t.sum(1) + rest)[:, None] * np.exp(logs)
    tail = rest[:, None] * outside / np.where(s_rest > 0, s_rest, 1)[:, None]
    np.testing.assert_allclose(grad, (total - t - tail) / S, atol=1e-7)


@pytest.mark.parametrize("kind", ["full", "topk"])
def test_zero_at_the_teacher(kind):
    teacher, _ = logits_pair(4)
    signal = full_signal(teacher) if kind == "full" else topk_signal(teacher, 4)
    logits = torch.cat([torch.from_numpy(teacher), torch.zeros(1, V)]).requires_grad_()

    loss, grad = value_and_grad(logits, one_sample_batch(signal))

    assert loss == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_gradient_against_finite_differences():
    teacher, logits = logits_pair(5)
    for signal in (topk_signal(teacher, 3), pps_signal(teacher, np.random.default_rng(0))):
        batch = one_sample_batch(signal)
        assert torch.autograd.gradcheck(lambda x, b=batch: forward_kl(x, b), logits)


def test_rest_of_a_confident_student_is_finite():
    """1 - S would be zero here, or below it, in float32; the masked log-sum-exp is exact."""
    teacher, _ = logits_pair(6)
    signal = topk_signal(teacher, 2)
    top = signal.ids_N.reshape(S, 2)[:, 0]
    raw = np.zeros((S + 1, V), dtype=np.float32)
    raw[np.arange(S), top] = 60.0
    logits = torch.from_numpy(raw).requires_grad_()

    loss, grad = value_and_grad(logits, one_sample_batch(signal))

    logs = dense_student(logits)
    t = signal.to_dense(V)
    rest = np.exp(signal.rest_S.astype(np.float64))
    s_rest = np.where(t > 0, 0.0, np.exp(logs)).sum(1)
    value = np.where(t > 0, t * (np.log(np.where(t > 0, t, 1)) - logs), 0).sum(1)
    value += rest * (np.log(rest) - np.log(s_rest))
    assert loss == pytest.approx(value.mean(), rel=1e-5)
    assert np.isfinite(grad).all()


def test_some_positions_without_rest():
    """One position whose entries are the whole vocabulary, next to one with a rest."""
    logp = log_softmax(np.random.default_rng(7).normal(size=(2, V)))
    whole, part = topk_signal(logp[:1], V), topk_signal(logp[1:], 2)
    both = SparseSignal.concat([replace(whole, selection="topk:k=2"), part])
    logits = torch.randn(3, V, dtype=torch.float64, requires_grad=True)

    each = forward_kl(logits, one_sample_batch(both), reduction="none")
    each.sum().backward()

    assert each[0].item() == pytest.approx(
        forward_kl(logits, one_sample_batch(whole)).item(), abs=1e-9
    )
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", ["full", "topk", "pps"])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_are_finite(kind, scale):
    teacher, logits = logits_pair(8)
    rng = np.random.default_rng(0)
    signals = {
        "full": full_signal(teacher),
        "topk": topk_signal(teacher, 3),
        "pps": pps_signal(teacher, rng),
    }
    raw = (logits.detach() * 0).float()
    raw[..., ::3] = scale
    raw.requires_grad_()
    loss, grad = value_and_grad(raw, one_sample_batch(signals[kind]))
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()


def test_entries_of_probability_zero_count_nothing():
    """A float16 `full` store has log-probabilities of -inf; the student may have them too."""
    signal = SparseSignal.from_arrays("full", [0, 3], [0, 1, 2], [-0.6931472, -0.6931472, -np.inf])
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 0.0, 0.0]], requires_grad=True)
    loss = forward_kl(logits, one_sample_batch(signal))
    loss.backward()
    logs = log_softmax(np.array([[0.0, 1.0]]))[0]
    assert loss.item() == pytest.approx((0.5 * (np.log(0.5) - logs)).sum(), abs=1e-6)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", ["full", "topk", "pps"])
def test_bfloat16_logits_are_summed_in_float32(kind):
    """A log-sum-exp rounded to bfloat16 is off by 0.02 to 0.05 nats."""
    teacher, logits = logits_pair(9)
    rng = np.random.default_rng(0)
    signal = {
        "full": full_signal(teacher),
        "topk": topk_signal(teacher, 3),
        "pps": pps_signal(teacher, rng),
    }[kind]
    batch = one_sample_batch(signal)
    half = (logits.detach() + 30).bfloat16()
    exact = half.double().requires_grad_()
    half.requires_grad_()

    loss = forward_kl(half, batch)
    loss.backward()
    forward_kl(exact, batch).backward()

    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(forward_kl(exact, batch).item(), abs=1e-4)
    # Rounded once, at the end: half a unit of bfloat16's 8 bits.
    torch.testing.assert_close(half.grad.double(), exact.grad, rtol=2**-8, atol=1e-7)


def test_reductions_and_weights():
    """Weights multiply the terms; they are no part of the denominator."""
    teacher, logits = logits_pair(10)
    batch = one_sample_batch(topk_signal(teacher, 3))
    each = forward_kl(logits, batch, reduction="none")
    assert each.shape == (S,)
    total = each.sum().item()
    assert forward_kl(logits, batch, reduction="sum").item() == pytest.approx(total)
    assert forward_kl(logits, batch).item() == pytest.approx(total / S)
    assert forward_kl(logits, batch, denominator=100).item() == pytest.approx(total / 100)
    assert forward_kl(logits, batch, denominator=torch.tensor(50)).item() == pytest.approx(
        total / 50
    )

    weights = torch.linspace(0, 3, S)
    weighted = forward_kl(logits, replace(batch, weights_S=weights))
    assert weighted.item() == pytest.approx((each * weights).sum().item() / S, rel=1e-6)


def test_wrong_reductions_are_refused():
    teacher, logits = logits_pair(10)
    batch = one_sample_batch(topk_signal(teacher, 3))
    with pytest.raises(UsageError, match="unknown reduction"):
        forward_kl(logits, batch, reduction="batchmean")
    with pytest.raises(UsageError, match="denominator"):
        forward_kl(logits, batch, reduction="sum", denominator=3)


def collated(samples, *, pack: bool):
    return Collator(pack=pack)(samples)


def test_padding_does_not_matter():
    """The token used as padding is an ordinary token of the samples."""
    samples, model = ragged_samples(6, seed=3), tiny_model()
    values = []
    for pad_id in (0, 5):
        batch = Collator(pad_id=pad_id)(samples)
        values.append(forward_kl(model(**batch.model_inputs()).logits, batch).item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_batch_against_dense_reference():
    """Rows are taken one before their token, in every sample of a padded batch of four."""
    samples, model = ragged_samples(4, seed=1), tiny_model(1)
    batch = collated(samples, pack=False)
    logits = model(**batch.model_inputs()).logits
    terms_S = []
    for index, sample in enumerate(samples):
        logs = log_softmax(logits[index].detach().numpy())[sample.positions_S - 1]
        t = sample.signal.to_dense(V)
        terms_S.append(-sample.signal.scalars["entropy"] - (t * logs).sum(1))
    expected = np.concatenate(terms_S)
    each = forward_kl(logits, batch, reduction="none").detach().numpy()
    np.testing.assert_allclose(each, expected, atol=1e-5)
