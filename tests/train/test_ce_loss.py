"""ce against torch's own cross-entropy, over the positions that carry a signal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdstore.errors import SignalError
from kdstore.readers.collate import Collator
from kdstore.train.losses import ce
from tests.train.train_helpers import V, one_sample_batch, ragged_samples, tiny_model, topk_signal


def test_equals_torch_in_float64():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V, 6)
    logits = torch.from_numpy(rng.normal(size=(1, 7, V))).requires_grad_()
    batch = one_sample_batch(topk_signal(rng.normal(size=(6, V)), 2), labels)

    loss = ce(logits, batch)
    (grad,) = torch.autograd.grad(loss, logits)

    expected = torch.nn.functional.cross_entropy(logits[0, :6], torch.from_numpy(labels))
    (expected_grad,) = torch.autograd.grad(expected, logits)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_equals_the_model_own_loss():
    """Hugging Face shifts labels itself; at a fully scored sample both see the same tokens."""
    samples, model = ragged_samples(6, seed=2), tiny_model()
    batch = Collator()(samples)
    output = model(**batch.model_inputs(), labels=batch.labels)
    assert ce(output.logits, batch).item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_bfloat16_logits():
    rng = np.random.default_rng(1)
    half = torch.from_numpy(rng.normal(size=(1, 4, V)) + 40).bfloat16()
    batch = one_sample_batch(topk_signal(rng.normal(size=(3, V)), 2), rng.integers(0, V, 3))
    assert ce(half, batch).item() == pytest.approx(ce(half.double(), batch).item(), abs=1e-4)


def test_labels_beyond_the_student_are_refused():
    batch = one_sample_batch(topk_signal(np.zeros((2, V)), 2), np.array([0, V]))
    with pytest.raises(SignalError, match=f"got: {V}"):
        ce(torch.zeros(1, 3, V), batch)
