"""Models of 16 columns run faster on one thread than on several; and a run to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kdstore.train import results
from kdstore.train.config import TeacherConfig, TrainConfig, load_config
from kdstore.train.online import OnlineSamples

HELD_OUT = ("in the beginning was a word", "and that made light there", "a word and the light")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One torch thread for the tests of this folder."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config_file(tmp_path: Path, rich_store: Path, teacher_dir: Path) -> Path:
    """A configuration in a file: four steps of a new student on the CPU, with held-out text."""
    rows = [json.dumps({"text": text}) for text in HELD_OUT]
    (tmp_path / "heldout.jsonl").write_text("\n".join(rows) + "\n")
    content = {
        "store": str(rich_store),
        "student": {"config": str(teacher_dir)},
        "losses": {"forward_kl": 1.0, "ce": 0.5},
        "loader": {"batch_size": 4},
        "eval": {"data": str(tmp_path / "heldout.jsonl"), "batch_size": 1},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "save_steps": 2,
            "learning_rate": 0.01,
            "logging_steps": 2,
            "use_cpu": True,
        },
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def configured(config_file: Path) -> Callable[..., TrainConfig]:
    """That configuration, with changes."""

    def load(*overrides: Any) -> TrainConfig:
        return load_config(config_file, [str(text) for text in overrides])

    return load


@pytest.fixture
def ask(teacher_dir, data_file):
    """Samples of the small teacher over the small data, online."""

    def ask_teacher(**options) -> OnlineSamples:
        given = {"unit_tokens": 500, **options}
        config = TeacherConfig(path=str(teacher_dir), data=str(data_file), **given)
        return OnlineSamples(config, quiet=True)

    return ask_teacher


@pytest.fixture
def online_run(configured, teacher_dir, data_file, monkeypatch):
    """A configuration of six steps of 16 samples, four of them an epoch, from the teacher."""
    monkeypatch.setattr(results, "_try_curves", lambda *_, **__: None)  # a second each

    def load(*changes):
        teacher = f"{{path: {teacher_dir}, data: {data_file}, unit_tokens: 500}}"
        given = ["store=null", f"teacher={teacher}", "training.max_steps=6", "eval=null"]
        return configured(*given, "loader={batch_size: 16}", *changes)

    return load
