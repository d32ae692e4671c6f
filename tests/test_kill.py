"""kill -9 of a running dump, again and again, loses nothing and changes nothing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import kdstore
from tests.writers.test_dump import assert_same, assert_same_store

KILLS = 10
EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny"


def dump_command(out: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "kdstore_cli.main", "dump", "--quiet"),
        *("--teacher", str(EXAMPLE / "teacher"), "--data", str(EXAMPLE / "text/student.jsonl")),
        *("--out", str(out), "--unit-tokens", "500", "--max-length", "256", *options),
    ]


def commits_in(out: Path) -> int:
    return len(list((out / "commits").glob("*.json"))) if out.exists() else 0


def killed_run(out: Path, delay_s: float, *, after_commit: bool) -> bool:
    """Starts the dump and kills it; whether it still ran then.

    The delay counts from the run's next commit, or from its start: imports, planning and loading
    take most of a short run, commits most of a long one.
    """
    before = commits_in(out)
    process = subprocess.Popen(dump_command(out))
    while after_commit and process.poll() is None and commits_in(out) == before:
        time.sleep(0.005)
    try:
        process.wait(timeout=delay_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_ten_kills_then_a_run(
    tmp_path: Path, kdstore_cli: Callable[..., tuple[int, str, str]]
) -> None:
    out, whole = tmp_path / "killed", tmp_path / "whole"
    generator = np.random.default_rng()
    early = [killed_run(out, d, after_commit=False) for d in generator.uniform(0, 3, 4)]
    late = [killed_run(out, d, after_commit=True) for d in generator.uniform(0, 0.3, KILLS - 4)]
    subprocess.run(dump_command(out), check=True)
    subprocess.run(dump_command(whole), check=True)
    assert sum(early + late) >= KILLS - 1, (early, late)
    ids = [sample.sample_id for sample in kdstore.open(out)]
    assert len(set(ids)) == len(ids)
    assert_same_store(whole, out)
    assert kdstore_cli("verify", "--quiet", out)[0] == 0


def test_a_kill_in_the_middle_of_an_overlay(
    tmp_path: Path, kdstore_cli: Callable[..., tuple[int, str, str]]
) -> None:
    """The store stays as it was and readable; the same command completes the overlay."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    options, overlay = ("--overlay", "draw1", "--draw", "1"), out / "overlays" / "draw1"
    subprocess.run(dump_command(out), check=True)
    shutil.copytree(out, whole)
    subprocess.run(dump_command(whole, *options), check=True)
    process = subprocess.Popen(dump_command(out, *options))
    while process.poll() is None and commits_in(overlay) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed = kdstore.open(out)
    assert 2 <= commits_in(overlay) < killed.header.num_units
    assert killed.num_draws == 1
    assert_same_store(whole, out)
    subprocess.run(dump_command(out, *options), check=True)
    one, other = kdstore.open(whole), kdstore.open(out)
    for index in range(len(one)):
        assert_same(one[index, 1], other[index, 1])
    assert kdstore_cli("verify", "--quiet", out)[0] == 0
