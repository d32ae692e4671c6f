"""Fake servers of the small teacher, asked without long waits between attempts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kdstore import retry
from tests.teachers.fake_openai import FakeServer, serving


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "REQUEST_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retry, "REQUEST_MAX_WAIT_S", 0.01)


@pytest.fixture
def server(teacher_dir: Path, short_waits: None) -> Iterator[FakeServer]:
    with serving(teacher_dir, flavour="vllm") as server:
        yield server


@pytest.fixture
def sglang(teacher_dir: Path, short_waits: None) -> Iterator[FakeServer]:
    with serving(teacher_dir, flavour="sglang") as server:
        yield server
