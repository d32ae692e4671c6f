"""Checkpoints that are whole or do not count, and that go only when a newer one is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers.trainer

from kdstore.errors import UsageError
from kdstore.train.checkpoint import (
    STATE_FILE,
    TrainingState,
    last_checkpoint,
    new_session,
    read_state,
    reopen,
    rotate,
    write_state,
)
from tests.train.train_helpers import make_trainer, parameters_of, ragged_samples, tiny_model

STATE = TrainingState(step=3, session=1, loader={"epoch": 1})


def make_checkpoint(folder: Path, step: int, *, session: int = 0, complete: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    if complete:
        write_state(checkpoint, TrainingState(step=step, session=session, loader=None))
    return checkpoint


def test_the_last_is_the_newest_that_is_complete(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None
    make_checkpoint(tmp_path, 20, complete=False)
    assert last_checkpoint(tmp_path) is None
    make_checkpoint(tmp_path, 9)
    ten = make_checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(str(tmp_path)) == ten
    reopen(ten)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"


def test_a_state_comes_back(tmp_path):
    assert read_state(tmp_path) is None
    write_state(tmp_path, STATE)
    assert read_state(tmp_path) == STATE
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"step": 3}', '{"version": 2, "step": 3, "session": 0, "loader": null}'],
)
def test_a_state_that_is_not_known_is_refused(tmp_path, text):
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(UsageError, match=r"no state of a run(.|\n)*expected: version 1"):
        read_state(tmp_path)


def test_a_later_session_is_newer_whatever_its_steps(tmp_path):
    """A run that is begun again where an older one went further."""
    assert new_session(tmp_path) == 0
    for step in (20, 30):
        make_checkpoint(tmp_path, step, session=4)
    assert new_session(tmp_path) == 5
    ten = make_checkpoint(tmp_path, 10, session=5)
    assert last_checkpoint(tmp_path) == ten
    rotate(tmp_path, limit=2, keep=[ten])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-30", "checkpoint-10"}


def test_models_alone_are_nothing_to_go_on_from(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer = make_trainer(tiny_model(), ragged_samples(8), tmp_path, max_steps=2, **options)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    assert last_checkpoint(tmp_path) is None


def test_rotation_removes_the_oldest_but_what_is_kept(tmp_path):
    for step in (2, 9, 10, 11):
        make_checkpoint(tmp_path, step)
    rotate(tmp_path, limit=None, keep=[])
    rotate(tmp_path, limit=2, keep=[tmp_path / "checkpoint-2", tmp_path / "checkpoint-11"])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-11"}
    rotate(tmp_path, limit=1, keep=[tmp_path / "checkpoint-2", tmp_path / "checkpoint-11"])
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-11"


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("name", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_save_that_is_cut_short_leaves_the_one_before(tmp_path, monkeypatch, name):
    """With save_total_limit 1, into a folder of an older run that has a checkpoint of that step."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    samples = ragged_samples(8)
    whole = make_trainer(tiny_model(), samples, tmp_path / "whole", **options)
    whole.train()
    folder = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", folder)
    shutil.move(folder / "checkpoint-3", folder / "checkpoint-2")
    save = getattr(transformers.trainer.Trainer, name)

    def cut(trainer, output_dir):
        if trainer.state.global_step == 2:
            raise Killed
        save(trainer, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.trainer.Trainer, name, cut)
        with pytest.raises(Killed):
            make_trainer(tiny_model(), samples, folder, **options).train()
    assert last_checkpoint(folder) == folder / "checkpoint-1"
    assert (folder / "checkpoint-2").is_dir()
    resumed = make_trainer(tiny_model(seed=1), samples, folder, **options)
    resumed.train(resume_from_checkpoint=True)
    assert parameters_of(resumed.model).equal(parameters_of(whole.model))
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]
    assert json.loads((folder / "checkpoint-3" / STATE_FILE).read_text())["step"] == 3
