"""The Python of docs/training.md and docs/losses.md runs as written, and their YAML is valid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdstore.train.config import TrainConfig, load_config
from kdstore.train.losses import LOSSES
from kdstore.train.objective import Objective

DOCS = Path(__file__).parents[2] / "docs"


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)


def load(content: dict[str, Any], folder: Path) -> TrainConfig:
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_config(path)


@pytest.mark.parametrize(("name", "count"), [("training.md", 4), ("losses.md", 1)])
def test_python_runs(name, count, dump, teacher_dir, data_file, tmp_path):
    found = blocks(name, "python")
    places = {
        "STORE": dump(),
        "STUDENT": teacher_dir,
        "TEACHER": teacher_dir,
        "OUTPUT": tmp_path / "out",
        "texts.jsonl": data_file,
    }
    for block in found:
        for word, path in places.items():
            block = block.replace(f'"{word}"', f'"{path}"')
        exec(compile(block, name, "exec"), {})
    assert len(found) == count


def test_the_configuration_loads_with_every_section(tmp_path):
    """The example, with the sections that the text shows one by one."""
    whole, online, *sections = blocks("training.md", "yaml")
    sections += blocks("losses.md", "yaml")
    content = yaml.safe_load(whole)
    for section in sections:
        content |= yaml.safe_load(section)
    content["teachers"] = {"coder": "OTHER"}
    config = load(content, tmp_path)
    assert config.lora is not None
    assert config.weights is not None
    assert Objective(config.losses).names == ["forward_kl", "ce", "jsd", "code"]
    teacher = load(yaml.safe_load(online), tmp_path).teacher
    assert teacher is not None
    assert teacher.record == "STORE"


def test_every_loss_has_a_row():
    text = (DOCS / "losses.md").read_text()
    assert [name for name in LOSSES if f"| `{name}`" not in text] == []
