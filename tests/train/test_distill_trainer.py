"""DistillTrainer: one denominator, per-loss logs, exact resume, evaluation divided once."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from kdstore.errors import UsageError
from kdstore.readers.collate import Collator
from kdstore.train.evaluate import _NUM_SUMS
from kdstore.train.losses import ce, forward_kl
from tests.train.train_helpers import (
    make_trainer,
    parameters_of,
    ragged_samples,
    sample_of,
    tiny_model,
)

LOSSES = {"forward_kl": 0.75, "ce": 0.25}


class StopAt(TrainerCallback):
    """Ends a run after a step, as a crash would, but with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


def reference_steps(samples, *, steps: int, batch: int, rate: float) -> torch.Tensor:
    """Plain SGD in sample order on the weighted sum of whole-batch losses."""
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in range(steps):
        whole = Collator()(samples[step * batch : (step + 1) * batch])
        logits = model(**whole.model_inputs()).logits
        loss = LOSSES["forward_kl"] * forward_kl(logits, whole) + LOSSES["ce"] * ce(logits, whole)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return parameters_of(model)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("per_batch", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_accumulation_changes_nothing(tmp_path, per_batch, accumulation, pack):
    """Micro-batches are ragged (one sample has no position): a mean of means would show."""
    samples = ragged_samples(32)
    model = tiny_model()
    make_trainer(
        model,
        samples,
        tmp_path,
        losses=LOSSES,
        pack=pack,
        per_device_train_batch_size=per_batch,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        train_sampling_strategy="sequential",
    ).train()
    expected = reference_steps(samples, steps=4, batch=8, rate=0.5)
    torch.testing.assert_close(parameters_of(model), expected, rtol=0, atol=1e-5)
    assert (expected - parameters_of(tiny_model())).abs().max() > 0.05


def test_logs_each_loss(tmp_path):
    """`loss` is the weighted sum of what is logged beside it, averaged over the steps."""
    samples = ragged_samples(16)
    trainer = make_trainer(
        tiny_model(),
        samples,
        tmp_path,
        losses=LOSSES | {"ce": 0.25},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=2,
        logging_steps=2,
        learning_rate=0.0,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)

    halves = [Collator()(samples[:8]), Collator()(samples[8:])]
    with torch.no_grad():
        outputs = [(tiny_model()(**half.model_inputs()).logits, half) for half in halves]
    for name, loss in (("forward_kl", forward_kl), ("ce", ce)):
        expected = sum(loss(*pair).item() for pair in outputs) / 2
        assert log[name] == pytest.approx(expected, abs=1e-5)
    total = sum(weight * log[name] for name, weight in LOSSES.items())
    assert log["loss"] == pytest.approx(total, abs=1e-5)


def test_a_loss_of_weight_zero_is_not_computed(tmp_path):
    trainer = make_trainer(
        tiny_model(), ragged_samples(4), tmp_path, losses={"ce": 1.0, "forward_kl": 0}, max_steps=1
    )
    trainer.train()
    assert "forward_kl" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["ce"] > 0


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_resume_is_exact(tmp_path, stop):
    """Interrupted in an epoch, at its end and in the next: the same weights, bit for bit."""
    samples = ragged_samples(16)
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
    }
    whole, first, second = tiny_model(), tiny_model(), tiny_model(seed=9)
    make_trainer(whole, samples, tmp_path / "whole", **options).train()
    folder = tmp_path / "parts"
    make_trainer(first, samples, folder, callbacks=[StopAt(stop)], **options).train()
    assert not torch.equal(parameters_of(first), parameters_of(whole))

    resumed = make_trainer(second, samples, folder, **options)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == 8
    assert torch.equal(parameters_of(second), parameters_of(whole))


def test_evaluate_divides_once(tmp_path):
    """Batches of 3 and 1 samples, of very different numbers of tokens."""
    held_out = [
        sample_of(length, ((1, length),), seed=length, name=str(length)) for length in (14, 3, 4, 5)
    ]
    model = tiny_model()
    trainer = make_trainer(
        model, ragged_samples(4), tmp_path, eval_dataset=held_out, per_device_eval_batch_size=3
    )
    metrics = trainer.evaluate()
    whole = Collator()(held_out)
    with torch.no_grad():
        expected = ce(model(**whole.model_inputs()).logits, whole).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert metrics["eval_num_tokens"] == 13 + 2 + 3 + 4


def test_ranks_of_a_tensor_parallel_group_evaluate_the_same_batches(tmp_path, monkeypatch):
    """Rank 3 of 4 in groups of two: the second of two that data is dealt to."""
    asked = {}
    monkeypatch.setattr(
        "kdstore.train.trainer.evaluation_sums",
        lambda *_args, **options: asked.update(options) or torch.ones(_NUM_SUMS).double(),
    )
    samples = ragged_samples(4)
    trainer = make_trainer(tiny_model(), samples, tmp_path, eval_dataset=samples)
    ranks = {"process_index": 3, "num_processes": 4, "reduce": lambda sums, **_: 4 * sums}
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(**ranks))
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
    monkeypatch.setattr(trainer, "log", lambda _: None)
    metrics = trainer.evaluate()
    assert (asked["rank"], asked["world_size"]) == (1, 2)
    assert metrics["eval_num_tokens"] == 2


def test_evaluates_while_training(tmp_path):
    trainer = make_trainer(
        tiny_model(),
        ragged_samples(8),
        tmp_path,
        eval_dataset=ragged_samples(4, seed=5),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        learning_rate=0.1,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert losses[0] != losses[1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1], rel=1e-6)


def test_forward_goes_through_the_wrapped_model(tmp_path):
    """What is called must be what Trainer hands over: a wrapper synchronises in its forward."""

    class Wrapper(torch.nn.Module):
        calls = 0

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            self.calls += 1
            return self.module(**inputs)

    trainer = make_trainer(tiny_model(), ragged_samples(2), tmp_path)
    wrapper = Wrapper(trainer.model)
    trainer.compute_loss(wrapper, Collator()(ragged_samples(2)))
    assert wrapper.calls == 1


def test_what_cannot_work_is_refused(tmp_path):
    samples = ragged_samples(2)
    with pytest.raises(UsageError, match=r"unknown key 'losses.forward_lk'\n.*forward_kl"):
        make_trainer(tiny_model(), samples, tmp_path, losses={"forward_lk": 1.0})
    with pytest.raises(UsageError, match="label_smoothing_factor"):
        make_trainer(tiny_model(), samples, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(UsageError, match="nothing to evaluate"):
        make_trainer(tiny_model(), samples, tmp_path).evaluate()
