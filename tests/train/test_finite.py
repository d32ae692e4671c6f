"""A run that diverges stops, says where it began, and leaves no checkpoint of it."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdstore.errors import TrainingError
from kdstore.train import finite
from kdstore.train.checkpoint import last_checkpoint
from tests.train.train_helpers import make_trainer, ragged_samples, tiny_model


def poisoned(count: int, index: int) -> list:
    """Samples of which one has an entropy that is not a number."""
    samples = [sample for sample in ragged_samples(count + count // 7 + 1) if sample.num_scored]
    sample = samples[index]
    scalars = {"entropy": np.full(sample.num_scored, np.nan)}
    samples[index] = replace(sample, signal=replace(sample.signal, scalars=scalars))
    return samples[:count]


OPTIONS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "sequential",
    "max_steps": 6,
    "logging_steps": 5,
}


def test_a_loss_that_is_not_finite_names_its_samples(tmp_path):
    """At the log of step 5, of the second micro-batch of step 3, with the last checkpoint."""
    samples = poisoned(24, 10)
    options = OPTIONS | {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(
        tiny_model(), samples, tmp_path, losses={"ce": 1.0, "forward_kl": 1.0}, **options
    )
    names = ", ".join(sample.sample_id for sample in samples[10:12])
    words = (
        "training diverged: the loss forward_kl is not finite\n"
        f"  where: step 3, a batch with the samples {names}, …\n"
    )
    with pytest.raises(TrainingError, match=re.escape(words)) as caught:
        trainer.train()
    assert f"go on from {tmp_path / 'checkpoint-2'}" in str(caught.value)
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert not (tmp_path / "checkpoint-4").exists()


@pytest.mark.parametrize("unchecked", [2, 100])
def test_without_logs_it_stops_soon_and_at_the_end(tmp_path, monkeypatch, unchecked):
    monkeypatch.setattr("kdstore.train.trainer.STEPS_UNCHECKED", unchecked)
    trainer = make_trainer(
        tiny_model(), poisoned(24, 2), tmp_path, **OPTIONS | {"logging_strategy": "no"}
    )
    with pytest.raises(TrainingError, match="step 1, a batch with the samples"):
        trainer.train()
    assert trainer.state.global_step == min(unchecked, 6)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = tiny_model()
    trainer = make_trainer(
        model, ragged_samples(8), tmp_path, max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=math.inf)
    with pytest.raises(TrainingError, match=r"weights that are not finite\n  where: step 1, model"):
        trainer.train()
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_gradient_that_is_not_finite_is_refused():
    finite.check_gradient({"loss": 1.0}, step=1, run=None)
    finite.check_gradient({"grad_norm": 2.0}, step=1, run=None)
    with pytest.raises(TrainingError, match=r"gradient is not finite\n  where: step 7"):
        finite.check_gradient({"grad_norm": math.inf}, step=7, run=None)


def test_finite_weights_have_no_name():
    model = tiny_model()
    assert finite.weights_not_finite(model) is None
    model.lm_head.weight.data[0, 0] = math.nan
    assert finite.weights_not_finite(model) == "lm_head.weight"
