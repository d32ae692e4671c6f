"""A record: what an online teacher says in the first epoch is a store from then on."""

from __future__ import annotations

import pytest
import torch

import kdstore
from kdstore.teachers.hf import HFTeacher
from kdstore.train import answers
from kdstore.train.dryrun import dry_run
from kdstore.train.run import run_training
from tests.train.train_helpers import assert_same_signal, trained


def units_scored(monkeypatch) -> list[str]:
    """A list that will have the first sample of each unit that a teacher is asked for."""
    scored: list[str] = []
    ask_teacher = HFTeacher.score

    def score(self, samples, *args, **kwargs):
        scored.append(samples[0].sample_id)
        return ask_teacher(self, samples, *args, **kwargs)

    monkeypatch.setattr(HFTeacher, "score", score)
    return scored


def test_a_record_is_a_dump_and_read_from_then_on(
    online_run, tmp_path, dump, kdstore_cli, monkeypatch, capsys
):
    scored = units_scored(monkeypatch)
    record = tmp_path / "record"
    first = run_training(online_run(f"teacher.record={record}"))
    assert f"{record} is complete, the teacher is released" in capsys.readouterr().err
    assert kdstore_cli("verify", record)[0] == 0

    asked, store = list(scored), kdstore.open(dump())
    found = kdstore.open(record)
    assert len(asked) == len(set(asked)) == found.header.num_units > 3
    assert found.header.to_bytes() == store.header.to_bytes()
    assert found.commits.texts("xxh3_128") == store.commits.texts("xxh3_128")
    assert list(record.glob("manifest-*"))
    assert first["record"] == str(record)
    assert first["store_complete"] is True

    monkeypatch.setattr("kdstore.teachers.hf.load_model", None)  # to call it is an error
    again = online_run(f"teacher.record={record}", f"training.output_dir={tmp_path / 'two'}")
    run_training(again, quiet=True)
    assert torch.equal(trained(tmp_path / "out"), trained(tmp_path / "two"))


def test_a_dump_that_was_begun_is_finished(ask, dump, monkeypatch):
    begun = dump(unit="0/2")
    units = kdstore.open(begun).commits.units.tolist()
    scored = units_scored(monkeypatch)
    online = ask(record=str(begun))
    samples = list(online)
    assert len(scored) == online.num_shards - len(units) > 1
    store = kdstore.open(dump("whole"))
    for one, other in zip(samples, store, strict=True):
        assert one.sample_id == other.sample_id
        assert_same_signal(one.signal, other.signal)


def test_a_crash_loses_no_unit(online_run, tmp_path, dump, monkeypatch):
    """Also where the loop goes on from its last checkpoint."""
    record = tmp_path / "record"
    changes = [f"teacher.record={record}", "loader={batch_size: 4, streams: 1}"]
    config = online_run(*changes, "training.save_steps=5", "training.max_steps=15")
    encode = answers.run_units
    calls = []

    def crash(writer, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            with monkeypatch.context() as patch:
                patch.setattr(type(writer.folder), "create", lambda *_: 1 / 0)
                encode(writer, *args, **kwargs)
        encode(writer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(answers, "run_units", crash)
        with pytest.raises(ZeroDivisionError):
            run_training(config, quiet=True)
    before = {path: path.read_bytes() for path in (record / "commits").iterdir()}
    assert len(before) == 2
    scored = units_scored(monkeypatch)
    run_training(config, resume=True, quiet=True)
    store = kdstore.open(record)
    assert len(scored) == store.header.num_units - 2
    assert all(path.read_bytes() == content for path, content in before.items())
    assert store.commits.texts("xxh3_128") == kdstore.open(dump()).commits.texts("xxh3_128")

    undisturbed = online_run(*changes, "training.max_steps=15", "training.save_strategy='no'")
    undisturbed.training["output_dir"] = str(tmp_path / "undisturbed")
    run_training(undisturbed, quiet=True)
    assert torch.equal(trained(tmp_path / "out"), trained(tmp_path / "undisturbed"))


def test_ranks_read_each_others_units(ask, tmp_path, monkeypatch):
    scored = units_scored(monkeypatch)
    ranks = [ask(record=str(tmp_path / "record")) for _ in range(2)]
    last = len(ranks[0]) - 1
    for one in ranks:
        one.prefetch([0, last])
        assert one[0].sample_id == "row-0"
    assert scored == ["row-0"]
    ranks[1][last], ranks[0][last]
    assert len(scored) == 2
    assert not ranks[0].is_complete
    list(ranks[0]), list(ranks[1])
    assert len(scored) == ranks[0].num_shards
    assert ranks[1].is_complete
    assert ranks[1]._teacher._model is None


def test_a_dry_run_records_nothing(online_run, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    found = dry_run(online_run(f"teacher.record={tmp_path / 'store'}"), quiet=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert (found["steps_planned"], found["num_samples"]) == (6, 60)
    assert found["batch_shapes"][0][0] == 16
    assert "forward_kl" in found["losses"]
