"""DistillTrainer on stores: batches of the loader, steps counted, epochs that end where they do."""

from __future__ import annotations

import math
import multiprocessing
from itertools import accumulate

import pytest
import torch

import kdstore
from kdstore.errors import StoreMismatchError, UsageError
from kdstore.readers.collate import Collator
from kdstore.readers.store import Store
from kdstore.train.losses import ce, forward_kl
from kdstore.train.trainer import DistillTrainer
from tests.readers.test_loader import FEW_CPUS, FORKS
from tests.train.stores import LOSSES, dropout_model, store_trainer, write_store
from tests.train.test_distill_trainer import StopAt
from tests.train.train_helpers import parameters_of, tiny_model

PACKED = {"pack": True, "max_length": 16}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """36 samples in six shards: a step of 8 is cut short at the end of each epoch."""
    return write_store(tmp_path_factory.mktemp("store") / "store", count=36)


def reference(store, **options) -> torch.Tensor:
    """Plain SGD on the mean of all positions of each whole batch of the loader."""
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in store.loader(seed=42, epochs=2, **options):
        logits = model(**batch.model_inputs()).logits
        loss = LOSSES["forward_kl"] * forward_kl(logits, batch) + LOSSES["ce"] * ce(logits, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return parameters_of(model)


@pytest.mark.parametrize("options", [{}, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_a_step_is_the_same_however_it_is_split(tmp_path, store, options, batch_size, accumulation):
    """The last step of an epoch is ragged too: fillers complete it and change nothing."""
    model = tiny_model()
    trainer = store_trainer(
        model,
        store,
        tmp_path,
        loader=options,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
    )
    trainer.train()
    expected = reference(store, batch_size=8, **options)
    torch.testing.assert_close(parameters_of(model), expected, rtol=0, atol=1e-5)
    assert (expected - parameters_of(tiny_model())).abs().max() > 0.05
    an_epoch = trainer.state.global_step // 2
    assert an_epoch == sum(1 for _ in store.loader(seed=42, batch_size=8, **options))
    epochs = [log["epoch"] for log in trainer.state.log_history[:-1]]
    assert (epochs[an_epoch - 1], epochs[-1]) == (1.0, 2.0)
    assert trainer.state.log_history[-1]["epoch"] == 2.0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_train_epochs": 2}, 10),
        ({"num_train_epochs": 2.3}, 12),
        ({"num_train_epochs": 0.2}, 1),
        ({"max_steps": 7}, 7),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 2}, 3),
    ],
)
def test_the_schedule_is_as_long_as_the_run(tmp_path, store, options, expected):
    trainer = store_trainer(tiny_model(), store, tmp_path, lr_scheduler_type="linear", **options)
    trainer.train()
    logs = trainer.state.log_history[:-1]
    assert trainer.state.global_step == trainer.state.max_steps == expected
    rates = [0.5 * (1 - step / expected) for step in range(expected)]
    assert [log["learning_rate"] for log in logs] == pytest.approx(rates)


def test_max_steps_counts_no_epoch(tmp_path, store, monkeypatch):
    monkeypatch.setattr("kdstore.readers.sequence.BatchSequence.count", None)
    trainer = store_trainer(tiny_model(), store, tmp_path, max_steps=6)
    trainer.train()
    assert trainer.state.epoch == pytest.approx(1 + 8 / 36)


def test_what_happens_at_an_epochs_end_happens_there(tmp_path, store):
    """Packed epochs of different lengths, in steps that Trainer was not told."""
    loader = {"pack": True, "batch_tokens": 48, "max_length": 16, "seed": 3}
    trainer = store_trainer(
        tiny_model(),
        store,
        tmp_path,
        loader=loader,
        num_train_epochs=3,
        save_strategy="epoch",
        gradient_accumulation_steps=2,
    )
    trainer.train()
    ends = [-(-steps // 2) for steps in store.loader(**loader).count_steps(3)]
    folders = {f"checkpoint-{step}" for step in accumulate(ends)}
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == folders
    assert trainer.state.global_step == sum(ends)


def test_speed_and_tokens_are_counted(tmp_path, store):
    trainer = store_trainer(
        tiny_model(),
        store,
        tmp_path,
        loader={"batch_tokens": 64},
        num_train_epochs=2,
        include_num_input_tokens_seen="non_padding",
    )
    metrics = trainer.train().metrics
    seen = metrics["train_samples_per_second"] * metrics["train_runtime"]
    assert seen == pytest.approx(72, rel=0.01)
    assert trainer.state.num_input_tokens_seen == 2 * sum(sample.num_tokens for sample in store)
    assert trainer.state.total_flos > 0


@pytest.mark.filterwarnings(FORKS, FEW_CPUS)
@pytest.mark.parametrize(
    ("layout", "accumulation"), [({}, 1), (PACKED, 4)], ids=["padded", "packed"]
)
@pytest.mark.parametrize(("stop", "epochs"), [(3, None), (5, 3.5), (6, None)])
def test_resume_with_other_workers_is_exact(tmp_path, store, stop, epochs, layout, accumulation):
    """In an epoch, at its end and in the next; with dropout, which random numbers decide."""
    options = {
        "loader": layout,
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        **({"max_steps": 8} if epochs is None else {"num_train_epochs": epochs}),
    }
    whole, first, second = dropout_model(), dropout_model(), dropout_model(seed=9)
    trainer = store_trainer(whole, store, tmp_path / "whole", **options)
    trainer.train()
    steps = trainer.state.global_step
    folder = tmp_path / "parts"
    store_trainer(first, store, folder, callbacks=[StopAt(stop)], **options).train()
    assert not torch.equal(parameters_of(first), parameters_of(whole))
    workers = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"}
    resumed = store_trainer(second, store, folder, **options, **workers)
    others = multiprocessing.active_children()  # an engine that tests share
    resumed.train(resume_from_checkpoint=True)
    assert {*multiprocessing.active_children()} <= {*others}
    assert resumed.state.global_step == resumed.state.max_steps == steps
    assert torch.equal(parameters_of(second), parameters_of(whole))


def test_a_finished_run_that_is_resumed_takes_no_step(tmp_path, store):
    for options in ({"max_steps": 4}, {"num_train_epochs": 1}):
        folder = tmp_path / next(iter(options))
        done = store_trainer(tiny_model(), store, folder, save_strategy="epoch", **options)
        done.train()
        trainer = store_trainer(tiny_model(seed=1), store, folder, **options)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == done.state.global_step
        assert torch.equal(parameters_of(trainer.model), parameters_of(done.model))


def test_a_checkpoint_of_other_options_or_data_is_refused(tmp_path, store):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    store_trainer(tiny_model(), store, tmp_path, **options).train()
    resume = {"resume_from_checkpoint": True}
    with pytest.raises(UsageError, match="another seed"):
        store_trainer(tiny_model(), store, tmp_path, data_seed=5, **options).train(**resume)
    other = write_store(tmp_path / "other", count=20)
    with pytest.raises(StoreMismatchError, match="other data"):
        store_trainer(tiny_model(), other, tmp_path, **options).train(**resume)
    (tmp_path / "checkpoint-2" / "kdstore_state.json").unlink()
    with pytest.raises(UsageError, match="does not say where the data was"):
        store_trainer(tiny_model(), store, tmp_path, **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    with pytest.raises(UsageError, match="nothing to resume"):
        store_trainer(tiny_model(), store, tmp_path / "none", **options).train(**resume)


def test_what_cannot_work_is_refused(tmp_path, store):
    def make(data=store, **options):
        return store_trainer(tiny_model(), data, tmp_path, **options)

    with pytest.raises(UsageError, match="set dataloader_num_workers"):
        make(loader={"num_workers": 2})
    with pytest.raises(UsageError, match=r"unknown key 'loader.batch_token'\n.*batch_tokens"):
        make(loader={"batch_token": 2})
    with pytest.raises(UsageError, match="dataloader_drop_last"):
        make(dataloader_drop_last=True)
    with pytest.raises(UsageError, match="loader is of no use here"):
        make(list(store), loader={"pack": True})
    with pytest.raises(UsageError, match="nothing to train on"):
        make(loader={"min_tokens": 1000}, max_steps=1).train()
    with pytest.raises(UsageError, match="data_collator would never be called"):
        DistillTrainer(
            tiny_model(),
            make().args,
            train_dataset=store,
            losses=LOSSES,
            data_collator=Collator(),
        )


def test_a_joined_teacher_reaches_the_loss(tmp_path, store):
    joined = kdstore.Join(store, {"second": store})
    trainer = store_trainer(tiny_model(), joined, tmp_path, max_steps=1)
    seen = []
    compute = trainer.compute_loss

    def spy(model, batch, *args, **kwargs):
        seen.append(batch)
        return compute(model, batch.of_teacher("second"), *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    (batch,) = seen
    assert torch.equal(batch.teachers["second"].signal.logprobs_N, batch.signal.logprobs_N)
    alone = store_trainer(tiny_model(), store, tmp_path, max_steps=1)
    alone.train()
    assert torch.equal(parameters_of(trainer.model), parameters_of(alone.model))


def test_a_mixture_trains_and_resumes(tmp_path, store):
    mixture = kdstore.Mixture([store, store], weights=[3, 1])
    options = {"num_train_epochs": 1.5, "per_device_train_batch_size": 4}
    whole = store_trainer(dropout_model(), mixture, tmp_path / "whole", **options)
    whole.train()
    first, second = mixture.loader(batch_size=4, seed=42).count_steps(2)
    assert whole.state.global_step == first + math.ceil(second / 2)
    first = store_trainer(
        dropout_model(), mixture, tmp_path / "parts", callbacks=[StopAt(20)], **options
    )
    first.train()
    assert first.state.epoch == pytest.approx(1.1, abs=0.06)
    second = store_trainer(dropout_model(seed=3), mixture, tmp_path / "parts", **options)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == whole.state.global_step
    assert torch.equal(parameters_of(second.model), parameters_of(whole.model))
