"""The README's Python runs as written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_every_python_block_runs_in_order(
    dump: Callable[..., Path], teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(dump().parent)
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    names = {"model": model, "torch": torch}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
    assert len(BLOCKS) == 3
    loss = float(names["loss"].detach())  # type: ignore[attr-defined]
    assert 0 < loss < 0.5  # the teacher as student: sampling noise, and what its padding ids take
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    assert len(next(iter(names["loader"])).sample_ids) == 8  # type: ignore[call-overload]
    assert names["signal"].to_dense(384).shape == (names["sample"].num_scored, 384)  # type: ignore[attr-defined]


def test_links_point_at_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
