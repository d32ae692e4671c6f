"""``kdstore dump --backend vllm`` as a user runs it, and with a worker killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

import kdstore
from tests.conftest import make_texts, write_jsonl
from tests.teachers.vllm.helpers import same_ids

Run = Callable[..., tuple[int, str, str]]
WAIT_S = 240


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"id": f"row-{i}", "text": text} for i, text in enumerate(make_texts(600, seed=5))]
    return write_jsonl(tmp_path / "texts.jsonl", rows)


def arguments(teacher: Path, data: Path, out: Path) -> list[str]:
    files = ["--teacher", str(teacher), "--data", str(data), "--out", str(out)]
    return [*files, "--unit-tokens", "2000", "--max-length", "100", "--batch-tokens", "256"]


def start(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kdstore_cli.main", "dump", "--backend", "vllm", *options]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **quiet})


def kill_worker(process: subprocess.Popen[str], out: Path) -> None:
    """SIGKILL to the process that has the model, once a unit is committed."""
    deadline = time.monotonic() + WAIT_S
    while not list(out.glob("commits/*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    below = psutil.Process(process.pid).children(recursive=True)
    (worker,) = [one for one in below if "VLLM::Worker" in " ".join(one.cmdline())]
    worker.send_signal(signal.SIGKILL)


def test_a_killed_worker_costs_a_unit_and_no_more(
    vllm_teacher_dir: Path, data: Path, tmp_path: Path, kdstore_cli: Run
) -> None:
    out, whole = tmp_path / "killed", tmp_path / "hf"
    options = arguments(vllm_teacher_dir, data, out)
    process = start("--quiet", *options)
    kill_worker(process, out)
    _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "the vLLM engine has died" in error
    assert "run the same command again" in error
    committed = len(list(out.glob("commits/*.json")))
    assert len(list(out.glob("data/*"))) == committed

    resumed = start(*options)
    _, error = resumed.communicate(timeout=WAIT_S)
    assert resumed.returncode == 0, error
    assert kdstore_cli("verify", "--quiet", out)[0] == 0
    assert kdstore_cli("dump", "--quiet", *arguments(vllm_teacher_dir, data, whole))[0] == 0

    ours, theirs = kdstore.open(out), kdstore.open(whole)
    assert 0 < committed < ours.header.num_units
    pairs = list(zip(ours, theirs, strict=True))
    assert len({sample.sample_id for sample in ours}) == len(pairs)
    for a, b in pairs:
        assert a.sample_id == b.sample_id
        np.testing.assert_array_equal(a.input_ids_T, b.input_ids_T)
        np.testing.assert_array_equal(a.positions_S, b.positions_S)
    shares = [same_ids(a.signal, b.signal) for a, b in pairs]
    assert np.mean(shares) >= 0.99
