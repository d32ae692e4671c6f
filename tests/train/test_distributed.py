"""Two ranks take the steps that one process would: the denominator is global."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kdstore
from tests.train.ddp_worker import LAYOUTS, SPLITS, train_online
from tests.train.launch import run_on_ranks
from tests.train.stores import store_trainer, write_store
from tests.train.test_distill_trainer import StopAt
from tests.train.train_helpers import make_trainer, parameters_of, ragged_samples, tiny_model

TWO_EPOCHS: dict[str, Any] = {"num_train_epochs": 2, "lr_scheduler_type": "linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher_dir, data_file) -> Path:
    """Of a store of 36 samples, and a run on it that one process stopped after step 3.

    Also of a teacher and its texts.
    """
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "teacher").symlink_to(teacher_dir)
    (folder / "texts.jsonl").symlink_to(data_file)
    store = write_store(folder / "store", count=36)
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    store_trainer(
        tiny_model(), store, folder / "one", callbacks=[StopAt(3)], **split, **TWO_EPOCHS
    ).train()
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Any]:
    """What two ranks end with."""
    run_on_ranks("ddp_worker.py", str(folder))
    return torch.load(folder / "found.pt")


def test_two_ranks_equal_one_process(tmp_path, found):
    """Ragged micro-batches on both ranks; the second half of each batch has fewer positions."""
    model = tiny_model()
    trainer = make_trainer(
        model,
        ragged_samples(16),
        tmp_path,
        losses={"forward_kl": 0.75, "ce": 0.25},
        eval_dataset=ragged_samples(3, seed=5),
        per_device_train_batch_size=8,
        max_steps=2,
        train_sampling_strategy="sequential",
    )
    trainer.train()

    two = found["list"]
    torch.testing.assert_close(two["parameters"], parameters_of(model), rtol=0, atol=1e-5)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for ours, theirs in zip(logs, two["logs"], strict=True):
        for name in ("loss", "forward_kl", "ce"):
            assert theirs[name] == pytest.approx(ours[name], abs=1e-5)
    metrics = trainer.evaluate()
    assert two["metrics"]["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5)
    assert two["metrics"]["eval_num_tokens"] == metrics["eval_num_tokens"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_on_a_store_equal_one_process(tmp_path, folder, found, layout):
    """However a step of 8 is split; the schedule falls once a step."""
    store = write_store(tmp_path / "store", count=36)
    options = {"per_device_train_batch_size": 8, **TWO_EPOCHS}
    one = store_trainer(tiny_model(), store, tmp_path, loader=LAYOUTS[layout], **options)
    one.train()
    rates = [log["learning_rate"] for log in one.state.log_history if "loss" in log]
    for batch_size, _ in SPLITS:
        two = found[f"{layout} {batch_size}"]
        expected = parameters_of(one.model)
        torch.testing.assert_close(two["parameters"], expected, rtol=0, atol=1e-5)
        assert two["rates"] == pytest.approx(rates)


def test_two_ranks_go_on_where_one_stopped(folder, found, tmp_path):
    store = write_store(tmp_path / "store", count=36)
    options = {"per_device_train_batch_size": 8, **TWO_EPOCHS}
    one = store_trainer(tiny_model(), store, tmp_path, **options)
    one.train()
    two = found["resumed"]
    torch.testing.assert_close(two["parameters"], parameters_of(one.model), rtol=0, atol=1e-5)
    assert len(two["rates"]) == 10


def test_two_ranks_with_teachers_equal_one(folder, found, tmp_path):
    """And what they have recorded together is what one records."""
    split = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    expected = train_online(folder, tmp_path, **split)
    torch.testing.assert_close(found["online"], expected, rtol=0, atol=1e-5)
    stores = [kdstore.open(path / "record") for path in (folder / "two", tmp_path)]
    assert stores[0].fingerprint == stores[1].fingerprint


def test_both_ranks_stop_where_one_diverges(found):
    """One says which samples, the other that it was the other."""
    first, second = found["diverged"]
    assert "step 2, a batch of another rank" in first
    assert "step 2, a batch with the samples " in second
