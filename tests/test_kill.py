"""kill -9 of a running dump, again and again, loses nothing and changes nothing."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdstore
from tests import dump_worker
from tests.writers.test_dump import assert_same, assert_same_store

KILLS = 10
EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny"
Dumping = Callable[..., Any]


def dump_arguments(out: Path, *options: str) -> list[str]:
    return [
        *("--teacher", str(EXAMPLE / "teacher")),
        *("--data", str(EXAMPLE / "text/student.jsonl"), "--out", str(out)),
        *("--unit-tokens", "500", "--max-length", "256", *options),
    ]


@pytest.fixture(scope="module")
def start(processes: Any) -> Dumping:
    """Starts a process that dumps the example to a folder."""

    def start(out: Path, *options: str) -> Any:
        arguments = ["--quiet", *dump_arguments(out, *options)]
        process = processes.Process(target=dump_worker.dump, args=(arguments,))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, start: Dumping) -> Path:
    """What an undisturbed run writes."""
    out = tmp_path_factory.mktemp("undisturbed") / "whole"
    finish(start(out))
    return out


def finish(process: Any) -> None:
    process.join()
    assert process.exitcode == 0


def commits_in(out: Path) -> int:
    return len(list((out / "commits").glob("*.json"))) if out.exists() else 0


def wait_for_commits(process: Any, out: Path, count: int) -> None:
    """Until there are so many, or the process has ended."""
    while process.is_alive() and commits_in(out) < count:
        time.sleep(0.005)


def killed(process: Any, *, after_s: float = 0) -> bool:
    """Kills it; whether it still ran then."""
    process.join(after_s)
    process.kill()
    process.join()
    return bool(process.exitcode == -signal.SIGKILL)


def killed_run(start: Dumping, out: Path, delay_s: float, *, after_commit: bool) -> bool:
    """Starts the dump and kills it; whether it still ran then.

    The delay counts from the run's next commit, or from its start: planning and loading
    take most of a short run, commits most of a long one.
    """
    before = commits_in(out)
    process = start(out)
    if after_commit:
        wait_for_commits(process, out, before + 1)
    return killed(process, after_s=delay_s)


def test_ten_kills_then_a_run(
    tmp_path: Path, start: Dumping, whole: Path, kdstore_cli: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "killed"
    generator = np.random.default_rng()
    early = [killed_run(start, out, d, after_commit=False) for d in generator.uniform(0, 1, 4)]
    late = [
        killed_run(start, out, d, after_commit=True) for d in generator.uniform(0, 0.3, KILLS - 4)
    ]
    finish(start(out))
    assert sum(early + late) >= KILLS - 1, (early, late)
    ids = [sample.sample_id for sample in kdstore.open(out)]
    assert len(set(ids)) == len(ids)
    assert_same_store(whole, out)
    assert kdstore_cli("verify", "--quiet", out)[0] == 0


def test_a_kill_in_the_middle_of_an_overlay(
    tmp_path: Path, start: Dumping, whole: Path, kdstore_cli: Callable[..., tuple[int, str, str]]
) -> None:
    """The store stays as it was and readable; the same command completes the overlay."""
    out, undisturbed = tmp_path / "killed", tmp_path / "whole"
    options, overlay = ("--overlay", "draw1", "--draw", "1"), out / "overlays" / "draw1"
    for copy in (out, undisturbed):
        shutil.copytree(whole, copy)
    finish(start(undisturbed, *options))
    process = start(out, *options)
    wait_for_commits(process, overlay, 2)
    assert killed(process)
    found = kdstore.open(out)
    assert 2 <= commits_in(overlay) < found.header.num_units
    assert found.num_draws == 1
    assert_same_store(undisturbed, out)
    finish(start(out, *options))
    one, other = kdstore.open(undisturbed), kdstore.open(out)
    for index in range(len(one)):
        assert_same(one[index, 1], other[index, 1])
    assert kdstore_cli("verify", "--quiet", out)[0] == 0
