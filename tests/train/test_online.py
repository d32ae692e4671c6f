"""Training without a store: a teacher in the same process, asked batch by batch."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

import kdstore
from kdstore.errors import StoreMismatchError, UsageError
from kdstore.select import DEFAULT_SCALARS, parse_selection
from kdstore.teachers import hf
from kdstore.teachers.scoring import Scoring
from kdstore.testing import assert_resumable
from kdstore.train import answers
from kdstore.train.run import run_training
from kdstore.train.sources import describe_data, open_data
from kdstore.train.trainer import DistillTrainer
from tests.train.train_helpers import (
    assert_same_signal,
    make_trainer,
    parameters_of,
    trained,
    training_arguments,
)


@pytest.mark.parametrize("select", ["topk:k=4", "pps:tau=0.06", "full"])
def test_signals_are_the_selections_own(ask, select):
    """Bit for bit those of the teacher that a dump asks, before any codec."""
    online = ask(select=select, temperatures=[1.5])
    samples = online.__getitems__([3, 41, 0])
    plain = [replace(sample, signal=None) for sample in samples]
    scores = (
        Scoring.of(online.config)
        .load_teacher()
        .score(plain, parse_selection(select), scalars=(*DEFAULT_SCALARS, "lse_T1.5"), seed=0)
    )
    by_id = {score.sample_id: score.signal for score in scores}
    assert [sample.sample_id for sample in samples] == ["row-3", "row-41", "row-0"]
    for sample in samples:
        assert_same_signal(sample.signal, by_id[sample.sample_id])


@pytest.mark.parametrize("select", ["topk:k=4", "pps:tau=0.06"])
def test_samples_are_those_of_a_dump(ask, dump, select):
    """The same tokens, spans, positions and entries; values as far as the codec keeps them."""
    options = {"select": select, "score": "all", "max_length": 32, "seed": 5}
    store, online = kdstore.open(dump(**options)), ask(**options)
    assert len(online) == len(store) > 60
    assert online.store.header.to_bytes() == store.header.to_bytes()
    assert np.array_equal(online.shard_rows, store.shard_rows)
    assert np.array_equal(online.shard_tokens, store.shard_tokens)
    for found, wanted in zip(online, store, strict=True):
        for name in ("sample_id", "spans", "runs", "text", "messages", "metadata"):
            assert getattr(found, name) == getattr(wanted, name)
        assert np.array_equal(found.input_ids_T, wanted.input_ids_T)
        assert np.array_equal(found.signal.ids_N, wanted.signal.ids_N)
        pair = (np.exp(one.signal.logprobs_N) for one in (found, wanted))
        np.testing.assert_allclose(*pair, atol=0.06)
        for name, values in wanted.signal.scalars.items():
            np.testing.assert_allclose(found.signal.scalars[name], values, rtol=0.05, atol=0.02)
    assert online.find(store[40].sample_id) == 40
    with pytest.raises(KeyError):
        online.find("nobody")


def test_draws_are_those_of_overlays(ask, rich_store):
    store, online = kdstore.open(rich_store), ask()
    wanted = store.__getitems__([(n, draw) for draw in (0, 1) for n in range(8)])
    found = online.__getitems__([(n, draw) for draw in (0, 1) for n in range(8)])
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one.signal.ids_N, other.signal.ids_N)


def ids_by_epoch(data, **options):
    """Of each of two epochs: sample id -> entries' ids."""
    loader = data.loader(epochs=1, **options)
    epochs = []
    for _ in range(2):
        found = {}
        for batch in loader:
            found[tuple(batch.sample_ids)] = batch.signal.ids_N.tolist()
        epochs.append(found)
    return epochs


def test_each_epoch_has_its_own_draw(ask):
    """The same whatever the batches are; topk has one answer for all epochs."""
    first, second = ids_by_epoch(ask(), batch_size=1)
    assert first.keys() == second.keys()
    assert len(first) == 60
    assert sum(first[name] != second[name] for name in first) > 50
    for epoch, whole in zip((first, second), ids_by_epoch(ask(), batch_size=60), strict=True):
        ((names, ids),) = whole.items()
        assert ids == list(chain.from_iterable(epoch[(name,)] for name in names))
    one, other = ids_by_epoch(ask(select="topk:k=4"), batch_size=1, max_tokens=20)
    assert len(one) > 10
    assert one == other
    again = ids_by_epoch(ask(), batch_size=1, draw=1)
    assert again == [{name: second[name] for name in epoch} for epoch in again]


def test_goes_on_with_other_ranks(ask):
    online = ask(select="topk:k=2")

    def make_loader(rank, world_size):
        return online.loader(batch_size=8, rank=rank, world_size=world_size)

    assert_resumable(make_loader, world_sizes=(1, 2), max_stops=2)


@pytest.fixture
def small_student(teacher_dir):
    """A new model of the teacher's kind."""

    def make():
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(teacher_dir))

    return make


@pytest.mark.parametrize("select", ["topk:k=4", "full"])
def test_trains_as_on_raw_signals(ask, small_student, tmp_path, select):
    online = ask(select=select)
    students = [small_student(), small_student()]
    arguments = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    arguments |= {"per_device_train_batch_size": 12}
    trainer = DistillTrainer(
        students[0],
        training_arguments(tmp_path, **arguments),
        train_dataset=online,
        losses={"forward_kl": 1.0},
    )
    assert trainer.train().global_step == 5
    raw = [s for n in range(0, 60, 12) for s in online.__getitems__(range(n, n + 12))]
    make_trainer(students[1], raw, tmp_path, **arguments).train()
    assert torch.equal(parameters_of(students[0]), parameters_of(students[1]))
    assert not torch.equal(parameters_of(students[0]), parameters_of(small_student()))


def test_resume_ends_where_one_run_ends(online_run, tmp_path, dump):
    """In the second epoch, with its draws."""
    whole = run_training(online_run(), quiet=True)
    parts = online_run(f"training.output_dir={tmp_path / 'parts'}")
    run_training(parts, quiet=True)
    (tmp_path / "parts" / "model.safetensors").unlink()
    (tmp_path / "parts" / "checkpoint-6").rename(tmp_path / "later")
    run_training(parts, resume=True, quiet=True)
    assert torch.equal(trained(tmp_path / "out"), trained(tmp_path / "parts"))

    assert whole["num_samples"] == 60
    assert (whole["record"], whole["store_complete"]) == (None, True)
    assert whole["teacher"] == parts.teacher.path
    store = kdstore.open(dump())
    assert whole["config_digest"] == store.config_digest
    assert whole["num_tokens"] == int(store.shard_tokens.sum())

    recorded = replace(parts, teacher=replace(parts.teacher, record=str(tmp_path / "store")))
    with pytest.raises(StoreMismatchError, match="of other data"):
        run_training(recorded, resume=True, quiet=True)


def test_the_command(kdstore_cli, config_file, teacher_dir, data_file):
    changes = ["store=null", f"teacher.path={teacher_dir}", f"teacher.data={data_file}"]
    code, printed, error = kdstore_cli("train", config_file, *changes, "training.max_steps=1")
    assert code == 0, error
    assert ["teacher", str(teacher_dir)] in [line.split() for line in printed.splitlines()]
    assert "eval_perplexity" in printed
    assert "warning" not in error


def test_only_some_columns(ask, tmp_path):
    for online in (ask(), ask(record=str(tmp_path / "record"))):
        scalars = online.with_columns(["entropy"])[5]
        assert (scalars.spans, list(scalars.signal.scalars)) == ((), ["entropy"])
        assert (scalars.signal.num_entries, len(scalars.signal)) == (0, scalars.num_scored)
        entries = online.with_columns(["entries", "spans"])[5]
        assert (entries.spans, dict(entries.signal.scalars)) == (online[5].spans, {})
        assert np.array_equal(entries.signal.ids_N, online[5].signal.ids_N)
        with pytest.raises(UsageError, match="no such column"):
            online.with_columns(["mood"])


def test_loading_the_teacher_draws_nothing_and_leaves_nothing(ask):
    before = torch.random.get_rng_state()
    online = ask()
    folder = Path(online.store.folder.url).parent
    assert online[0].signal is not None
    assert torch.equal(torch.random.get_rng_state(), before)
    assert folder.exists()
    online.close()
    assert online[0].signal is not None
    del online
    assert not folder.exists()


def test_launchers_do_not_reach_the_teacher(ask, monkeypatch):
    """Ranks have GPUs of their own, and FSDP would have all but one load no weights."""
    seen = []
    load = hf.load_model
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(
        hf,
        "load_model",
        lambda *args, **options: (
            seen.append(os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]) or load(*args, **options)
        ),
    )
    assert ask()[0].num_scored > 0
    assert (seen, os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]) == (["false"], "true")
    monkeypatch.setattr(answers, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UsageError, match="ZeRO-3 would cut up the teacher"):
        ask()[0]
    monkeypatch.setattr("kdstore.train.online.default_device", lambda: "cuda")
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(UsageError, match="'cuda:99'"):
        ask()


def test_other_processes_are_refused(ask):
    online = ask()
    with pytest.raises(UsageError, match=r"workers cannot read[^\n]*\n.*\n  expected: num_workers"):
        online.loader(batch_size=4, num_workers=1)
    with pytest.raises(UsageError, match="workers cannot read"):
        kdstore.Mixture([online], repeat=[1]).loader(batch_size=4, num_workers=1)
    with pytest.raises(UsageError, match="stays in its process"):
        pickle.dumps(online)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["store=somewhere"], r"exactly one of .*\n  got: store, teacher"),
        (["teacher=null"], r"exactly one of store, mixture and teacher\n  got: none"),
        (["training.dataloader_num_workers=2"], r"where: training.dataloader_num_workers"),
        (["teacher.audit_fraction=0.5"], r"audits are stored.*\n  where: teacher.audit_fraction"),
        (["teacher.slect=full"], r"did you mean 'teacher.select'"),
        (["teacher.score=most"], r"teacher.score has the wrong type"),
        (["teacher.batch_tokens=0"], "no batch_tokens"),
    ],
)
def test_what_cannot_work_is_refused_early(online_run, changes, message):
    with pytest.raises(UsageError, match=message):
        online_run(*changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "best"}, "best"),
        ({"max_length": 1000}, r"max_length is more than the teacher takes"),
        ({"temperatures": [0.0]}, "unknown scalar"),
        ({"device": "banana"}, "banana"),
    ],
)
def test_what_a_dump_refuses_is_refused(ask, options, message):
    with pytest.raises(UsageError, match=message):
        ask(**options)


def test_another_draw_or_store_is_refused(ask, dump):
    with pytest.raises(UsageError, match="no such draw"):
        ask(select="topk:k=2")[0, 1]
    with pytest.raises(StoreMismatchError, match=r"seed"):
        ask(record=str(dump()), seed=1)


def test_an_online_teacher_can_be_joined(online_run, dump):
    other = dump("other", select="topk:k=3")
    data = open_data(online_run(f"teachers={{second: {other}}}"), quiet=True)
    sample = data[9, 4]
    assert sample.teachers["second"].sample_id == sample.sample_id
    assert sample.teachers["second"].signal.selection == "topk:k=3"
    assert describe_data(data)["config_digest"].endswith(kdstore.open(other).config_digest)
    with pytest.raises(UsageError, match="workers cannot read"):
        data.loader(batch_size=2, num_workers=1)


def test_a_plain_data_loader_reads_it(ask):
    loader = DataLoader(ask(), batch_size=8, collate_fn=kdstore.Collator())
    batches = list(islice(loader, 2))
    assert batches[1].sample_ids[0] == "row-8"
